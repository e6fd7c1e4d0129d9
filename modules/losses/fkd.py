"""Fact-counter knowledge distillation (FKD): its terms as pure functions of logits.

q = softmax(teacher / T) and p = softmax(student / T) over the pool P: the catalogue without the history, the observed item
y always included. The teacher never receives a gradient. These are the definitions; over a whole catalogue train with
:func:`lightning_sfubm.modules.losses.distillation.distil`, which computes the same values and gradients in chunks.

[paper] arXiv 2604.14833 names the idea; the formulas are [choice].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.modules.losses.unit import unit


def pool_mask(exclude: Tensor, targets: Tensor) -> Tensor:
    """Columns that are not in the pool.

    Args:
        exclude: (V, N + 1) boolean, True at the history's items.
        targets: (V,) observed items, always in the pool.

    Returns:
        (V, N + 1) boolean, with the padding column excluded and the targets included.
    """
    mask = exclude.clone()
    mask[:, 0] = True
    return mask.scatter_(1, targets[:, None], False)


def _log_softmax(logits: Tensor, exclude: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((logits / temperature).masked_fill(exclude, -torch.inf), -1)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Row-wise KL(q || p) (V,); entries with q = 0 add nothing, whatever p is."""
    q = log_q.exp()
    difference = torch.where(q > 0, log_q - log_p, torch.zeros_like(q))
    return (q * difference).sum(-1)


def _log_rest(log_probability: Tensor) -> Tensor:
    """log(1 - p) from log p <= 0, finite also where p rounds to 1."""
    return torch.log(-torch.expm1(log_probability.clamp(max=-1e-7)))


def full_kl(student: Tensor, teacher: Tensor, exclude: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) over the pool.

    Args:
        student: (V, N + 1) logits.
        teacher: (V, N + 1) logits.
        exclude: (V, N + 1) boolean, True at columns outside the pool.
        temperature: T > 0.

    Returns:
        (V,) divergences.
    """
    return _kl(_log_softmax(teacher.detach(), exclude, temperature), _log_softmax(student, exclude, temperature))


def fact(student: Tensor, teacher: Tensor, targets: Tensor, exclude: Tensor, temperature: float = 1.0) -> Tensor:
    """FACT: ``T^2 KL([q_y, 1 - q_y] || [p_y, 1 - p_y])``, how probable the observed item was.

    Args:
        student: (V, N + 1) logits.
        teacher: (V, N + 1) logits.
        targets: (V,) observed items.
        exclude: (V, N + 1) boolean, True at columns outside the pool, never at the target.
        temperature: T > 0.

    Returns:
        (V,) divergences.
    """
    column = targets[:, None]
    log_q = _log_softmax(teacher.detach(), exclude, temperature).gather(1, column).squeeze(1)
    log_p = _log_softmax(student, exclude, temperature).gather(1, column).squeeze(1)
    rest = _log_rest(log_q)
    return temperature**2 * (log_q.exp() * (log_q - log_p) + rest.exp() * (rest - _log_rest(log_p)))


def non_target(student: Tensor, teacher: Tensor, targets: Tensor, exclude: Tensor, temperature: float = 1.0) -> Tensor:
    """COUNTER ``non_target``: ``T^2 KL(q without y || p without y)``, what would have been taken had y not existed.

    Arguments and result as in :func:`fact`; 0 where there is nothing but y in the pool. At T = 1,
    ``fact + (1 - q_y) * non_target == full_kl``.
    """
    without = exclude.scatter(1, targets[:, None], True)
    empty = without.all(1)
    divergence = full_kl(student, teacher, without & ~empty[:, None], temperature)
    return temperature**2 * divergence.masked_fill(empty, 0.0)


def what_if(student: Tensor, teacher: Tensor, exclude: Tensor, temperature: float = 1.0) -> Tensor:
    """COUNTER ``what_if``: ``KL(q(.|S') || p(.|S'))`` for logits of both branches after a counterfactual sequence S'.

    Arguments and result as in :func:`full_kl`; see :func:`swap_items` for S'.
    """
    return full_kl(student, teacher, exclude, temperature)


def swap_items(history: Tensor, neighbours: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Counterfactual sequences S': each item is swapped with the given probability for one of its neighbours.

    Args:
        history: (B, L) item ids, 0 at padding.
        neighbours: (N + 1, k) item ids near each item in z-space, row 0 zero.
        probability: chance of a swap per item.
        generator: CPU generator of the named stream.

    Returns:
        (B, L) item ids, padding unchanged.
    """
    swap = torch.rand(history.shape, generator=generator).to(history.device) < probability
    which = torch.randint(neighbours.shape[1], history.shape, generator=generator).to(history.device)
    return torch.where(swap, neighbours[history, which], history)


def nearest_items(table: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """The k nearest other items of each item by cosine.

    Args:
        table: (N + 1, H) item vectors, row 0 padding.
        k: neighbours, at most N - 1 are returned.
        chunk: rows compared at a time.

    Returns:
        (N + 1, k) item ids, row 0 zero.
    """
    unit = F.normalize(table, dim=-1)
    k = min(k, len(table) - 2)
    nearest = torch.zeros(len(table), k, dtype=torch.int64, device=table.device)
    for start in range(1, len(table), chunk):
        rows = torch.arange(start, min(start + chunk, len(table)), device=table.device)
        cosines = unit[rows] @ unit.T
        cosines[:, 0] = -torch.inf
        cosines.scatter_(1, rows[:, None], -torch.inf)
        nearest[rows] = cosines.topk(k, 1).indices
    return nearest


def align(ids: Tensor, semantics: Tensor, tau: float = 0.07) -> Tensor:
    """ALIGN: InfoNCE that finds each item's semantic vector among those of the batch's items.

    Args:
        ids: (M, H) projected ID embeddings of distinct items.
        semantics: (M, H) semantic embeddings of the same items; receive no gradient.
        tau: temperature of the cosines.

    Returns:
        Scalar mean loss; 0 for fewer than two items.
    """
    if len(ids) < 2:
        return 0.0 * ids.sum()
    logits = unit(ids) @ unit(semantics.detach()).T / tau
    return F.cross_entropy(logits, torch.arange(len(ids), device=ids.device))


def prefixes(history: Tensor, predicting: Tensor) -> Tensor:
    """What was known at each predicting position.

    Args:
        history: (B, L) item ids.
        predicting: (B, L) boolean with V true entries.

    Returns:
        (V, L) the row's items up to and including the position, 0 after it.
    """
    rows, positions = predicting.nonzero(as_tuple=True)
    later = torch.arange(history.shape[1], device=history.device) > positions[:, None]
    return history[rows].masked_fill(later, 0)
