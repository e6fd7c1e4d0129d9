"""The student's whole-catalogue loss, cross-entropy and FKD terms together, in one pass over chunks of positions.

The V x N logits of student and teacher never exist at once, and each is computed once: the gradient with respect to the
student's logits has a closed form, so forward and backward share a chunk. Values and gradients equal those of the pure
functions in :mod:`lightning_sfubm.modules.losses.fkd` (tested).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sfubm.modules.losses.cross_entropy import softmax_in_place
from lightning_sfubm.modules.losses.precision import Precision, matmul_dtype, pad_rows, rows_per_chunk

TERMS = ("ce", "fact", "non_target", "full_kl")


@dataclass(frozen=True)
class DistilWeights:
    """Weights of the terms; a zero removes a term from the loss, its value is still reported.

    Attributes:
        ce: cross-entropy of the observed item over the whole catalogue (history included).
        fact: FACT over the pool.
        non_target: COUNTER ``non_target`` over the pool.
        full_kl: KL(q || p) over the pool, the form of COUNTER ``what_if``.
    """

    ce: float = 1.0
    fact: float = 0.0
    non_target: float = 0.0
    full_kl: float = 0.0


def without_repeats(exclude: Tensor, targets: Tensor) -> Tensor:
    """Keep one of equal ids in each row of (V, S) and drop the row's target; what is dropped becomes 0."""
    ordered = exclude.sort(1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated | (ordered == targets[:, None]), 0)


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        teacher_states: Tensor,
        teacher_table: Tensor,
        targets: Tensor,
        exclude: Tensor,
        weights: DistilWeights,
        temperature: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        count = len(states)
        h, teacher_h, targets, exclude = pad_rows(
            states.detach().to(dtype), teacher_states.detach().to(dtype), targets, exclude
        )
        items, teacher_items = table.detach().to(dtype), teacher_table.detach().to(dtype)
        step = rows_per_chunk(len(table), dtype, states.device)
        grad_states, grad_table = states.new_empty(h.shape), torch.zeros_like(table)
        values = torch.zeros(len(TERMS), dtype=torch.float32, device=states.device)
        # Blocks are allocated once and used in place: fresh ones cost more in page faults than the softmax.
        blocks = [h.new_empty(min(step, len(h)), len(items)) for _ in range(2 if temperature == 1.0 else 3)]
        product = torch.empty_like(items)
        for start in range(0, len(h), step):
            rows, real = slice(start, start + step), max(count - start, 0)
            grad, terms = _chunk(
                h[rows],
                items,
                teacher_h[rows],
                teacher_items,
                targets[rows].clamp_min(1),
                exclude[rows],
                weights,
                temperature,
                [block[: len(h[rows])] for block in blocks],
            )
            grad[real:] = 0.0  # rows of padding
            values += terms[:, :real].sum(1)
            grad_states[rows] = grad @ items
            grad_table += torch.mm(grad.T, h[rows], out=product)
        ctx.save_for_backward(grad_states[:count].div_(count), grad_table.div_(count))
        values /= count
        loss = sum(getattr(weights, name) * value for name, value in zip(TERMS, values, strict=True))
        ctx.mark_non_differentiable(values)
        return loss, values  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_table = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (grad_states * grad if needs[0] else None, grad_table * grad if needs[1] else None, *[None] * 7)


def _chunk(
    h: Tensor,
    items: Tensor,
    teacher_h: Tensor,
    teacher_items: Tensor,
    target: Tensor,
    exclude: Tensor,
    weights: DistilWeights,
    temperature: float,
    blocks: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the student's logits (c, N + 1) and the four terms (4, c)."""
    s = torch.mm(h, items.T, out=blocks[0])
    t = torch.mm(teacher_h, teacher_items.T, out=blocks[1])
    outside = s.gather(1, exclude).float().masked_fill(exclude == 0, -torch.inf)
    for logits in (s, t):
        logits[:, 0] = -torch.inf
        logits.scatter_(1, exclude, -torch.inf)

    # Both branches at temperature T; the student at T = 1 as well, for the cross-entropy.
    if temperature == 1.0:
        s_y, pool = softmax_in_place(s, h, items, target)
        p = p_t = s
        log_p_y = s_y - pool
        log_z_p = pool
    else:
        t /= temperature
        p_t = torch.div(s, temperature, out=blocks[2])
        s_y, pool = softmax_in_place(s, h, items, target)
        scaled, log_z_p = softmax_in_place(p_t, h / temperature, items, target)
        p, log_p_y = s, scaled - log_z_p
    t_y, log_z_q = softmax_in_place(t, teacher_h / temperature, teacher_items, target)
    q_t = t
    log_p_y, log_q_y = log_p_y.clamp(max=-1e-6), (t_y - log_z_q).clamp(max=-1e-6)
    p_y, q_y, p_rest, q_rest = log_p_y.exp(), log_q_y.exp(), -torch.expm1(log_p_y), -torch.expm1(log_q_y)

    # Cross-entropy counts the history as well: its share of the denominator is added from the few excluded logits.
    whole = torch.logaddexp(pool, outside.logsumexp(1))
    ce = whole - s_y

    # sum_j q_j s_j = h . (q @ items): a thin product instead of a pass over the whole chunk.
    mean_t = (teacher_h.float() * (q_t @ teacher_items).float()).sum(1) / temperature
    mean_s = (h.float() * (q_t @ items).float()).sum(1) / temperature
    kl = mean_t - log_z_q - mean_s + log_z_p
    fact = q_y * (log_q_y - log_p_y) + q_rest * (q_rest.log() - p_rest.log())
    non_target = (kl - fact) / q_rest
    square = temperature**2
    terms = torch.stack([ce, square * fact, square * non_target, kl])

    # Gradient: one coefficient per row for p and for q, then the observed and the excluded columns set exactly.
    of_p = weights.full_kl / temperature + temperature * (weights.non_target + weights.fact * (q_y - p_y)) / p_rest
    of_q = weights.full_kl / temperature + temperature * weights.non_target / q_rest
    of_ce = weights.ce * torch.exp(pool - whole)
    at_y = (weights.full_kl / temperature + temperature * weights.fact) * (p_y - q_y) - weights.ce * -torch.expm1(-ce)
    dtype = p.dtype
    if temperature == 1.0:
        grad = p.mul_((of_p + of_ce).to(dtype)[:, None])
    else:
        grad = p.mul_(of_ce.to(dtype)[:, None]).addcmul_(p_t, of_p.to(dtype)[:, None])
    if weights.full_kl or weights.non_target:
        grad.addcmul_(q_t, of_q.to(dtype)[:, None], value=-1)
    grad.scatter_(1, exclude, (weights.ce * torch.exp(outside - whole[:, None])).to(dtype))
    grad[torch.arange(len(h), device=h.device), target] = at_y.to(dtype)
    return grad, terms


def distil(
    states: Tensor,
    table: Tensor,
    teacher_states: Tensor,
    teacher_table: Tensor,
    targets: Tensor,
    exclude: Tensor,
    weights: DistilWeights,
    temperature: float = 1.0,
    precision: Precision = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the student's terms over all N items, averaged over positions.

    Logits are ``states @ table.T`` for each branch; scale them beforehand for cosine logits
    (:func:`~lightning_sfubm.modules.losses.cross_entropy.cosine_inputs`). No gradient reaches the teacher.

    Args:
        states: (V, H) student states.
        table: (N + 1, H) student item vectors.
        teacher_states: (V, H) teacher states of the same positions.
        teacher_table: (N + 1, H) teacher item vectors.
        targets: (V,) observed items.
        exclude: (V, S) item ids of each position's history, padded with 0; repeats and the target are ignored.
        weights: weights of the terms.
        temperature: T > 0 of the FKD terms; cross-entropy is always at T = 1.
        precision: format of the products.

    Returns:
        The differentiable loss, and the unweighted values ``ce``, ``fact``, ``non_target``, ``full_kl`` (detached).
    """
    if len(states) == 0:
        return states.sum() + 0.0 * table.sum(), {name: states.new_zeros(()) for name in TERMS}
    loss, values = _Distil.apply(
        states,
        table,
        teacher_states,
        teacher_table,
        targets,
        without_repeats(exclude, targets),
        weights,
        temperature,
        matmul_dtype(precision, states.device),
    )
    return loss, dict(zip(TERMS, values, strict=True))
