"""The student's whole-catalogue loss, cross-entropy and FKD terms together, in one pass over chunks of positions.

The V x N logits of student and teacher never exist at once, and each is computed once: the gradient with respect to the
student's logits has a closed form, so forward and backward share a chunk. Values and gradients equal those of the pure
functions in :mod:`lightning_sfubm.modules.losses.fkd` (tested), gradients but for positions whose target has all but 1e-7
of the probability: there the pure functions' clamp leaves none.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sfubm.modules.losses.exponentials import (
    LOG_2,
    BlockMemory,
    TableGradient,
    block_steps,
    column_sums,
    exponentials,
    leave_out,
    log2_logits,
    logits_are_safe,
    times,
)
from lightning_sfubm.modules.losses.precision import Precision, matmul_dtype, pad_rows

TERMS = ("ce", "fact", "non_target", "full_kl")

_TINY = 1e-30  # below every sum of exponentials but that of an empty pool
_LOG_REST = math.log(1e-7)  # least log(1 - probability), as in the definitions


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
            states.detach().float(), teacher_states.detach().float() / temperature, targets, exclude
        )
        vectors, teacher_vectors = table.detach(), teacher_table.detach()
        chunk = _Chunk(h, vectors, teacher_h, teacher_vectors, weights, temperature, dtype)
        targets = targets.clamp_min(1)
        chosen = F.embedding(targets, vectors)
        observed = (h * chosen).sum(1), (teacher_h * F.embedding(targets, teacher_vectors)).sum(1)
        grad_states, at_target = torch.empty_like(h), torch.empty_like(observed[0])
        of_table = TableGradient(chunk.items)
        values = torch.zeros(len(TERMS), dtype=torch.float32, device=h.device)
        for rows in block_steps(len(h), len(table), dtype, h.device):
            grad, at_target[rows], terms = chunk.gradient(
                h[rows], teacher_h[rows], targets[rows], exclude[rows], (observed[0][rows], observed[1][rows])
            )
            values += terms[:, : max(count - rows.start, 0)].sum(1)
            grad_states[rows] = torch.mm(chunk.items.T, grad).T
            of_table.add(grad, (h[rows] / count).to(dtype))
        grad_table = of_table.total()
        grad_states += at_target[:, None] * chosen
        grad_table.index_add_(0, targets, h * (at_target / count)[:, None])  # rows of padding are zero
        ctx.save_for_backward(grad_states[:count].div_(count).to(states.dtype), grad_table.to(table.dtype))
        values /= count
        loss = sum(getattr(weights, name) * value for name, value in zip(TERMS, values, strict=True))
        ctx.mark_non_differentiable(values)
        return loss, values  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_table = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            times(grad_states, grad) if needs[0] else None,
            times(grad_table, grad) if needs[1] else None,
            *[None] * 7,
        )


class _Chunk:
    """Formats, memory and numerical safety of a step, shared by its blocks of positions.

    Args:
        h: (V, H) student states.
        table: (N + 1, H).
        teacher_h: (V, H) teacher states, divided by T.
        teacher_table: (N + 1, H).
        weights: of the terms.
        temperature: T.
        dtype: format of the products.
    """

    def __init__(
        self,
        h: Tensor,
        table: Tensor,
        teacher_h: Tensor,
        teacher_table: Tensor,
        weights: DistilWeights,
        temperature: float,
        dtype: torch.dtype,
    ) -> None:
        self.items, self.teacher_items = table.to(dtype), teacher_table.to(dtype)
        self.weights, self.temperature = weights, temperature
        self._safe = logits_are_safe(h, table)
        self._scaled_safe = self._safe if temperature == 1.0 else logits_are_safe(h, table, temperature)
        self._teacher_safe = logits_are_safe(teacher_h, teacher_table)
        self._block = BlockMemory(self.items)

    def gradient(
        self, h: Tensor, teacher_h: Tensor, target: Tensor, exclude: Tensor, observed: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the summed loss with respect to the student's logits.

        Args:
            h: (c, H).
            teacher_h: (c, H), divided by T.
            target: (c,).
            exclude: (c, S) without repeats and target, padded with 0.
            observed: logits of the target, (c,) each: the student's, and the teacher's over T.

        Returns:
            The gradient (N + 1, c) at all items but the target, that at the target (c,), and the four terms (4, c).
        """
        weights, temperature, width = self.weights, self.temperature, len(h)
        columns = torch.arange(width, device=h.device)
        row, place = exclude.nonzero(as_tuple=True)
        history = exclude[row, place], row
        s = log2_logits(h / temperature, self.items, self._block(0, width))
        t = log2_logits(teacher_h, self.teacher_items, self._block(1, width))
        outside = torch.full(exclude.shape, -torch.inf, dtype=torch.float32, device=h.device)
        if temperature == 1.0:
            outside[row, place] = s[history].float() * LOG_2
        gap = torch.sub(t, s, out=self._block(2, width))
        for logits in (s, t):
            leave_out(logits, target, columns)
            leave_out(logits, *history)

        # Both branches over the pool without the target: "rest". Sums of exponentials and their logs.
        s_y, t_y = observed
        p, p_shift = exponentials(s, self._scaled_safe)
        q, q_shift = exponentials(t, self._teacher_safe)
        p_sum, q_sum = (column_sums(block).clamp_min(_TINY) for block in (p, q))
        log_p, log_q = p_shift + p_sum.log(), q_shift + q_sum.log()
        p_pool, q_pool = torch.logaddexp(log_p, s_y / temperature), torch.logaddexp(log_q, t_y)
        log_p_y, log_q_y = s_y / temperature - p_pool, t_y - q_pool
        log_p_rest, log_q_rest = log_p - p_pool, log_q - q_pool
        # A history of all items but the target leaves no rest to compare: the logs of its sums stand for none.
        empty = (exclude != 0).sum(1) == len(self.items) - 2
        p_y, q_y = log_p_y.exp(), log_q_y.exp()
        p_rest, q_rest = (log.exp().masked_fill(empty, 0.0) for log in (log_p_rest, log_q_rest))

        # sum_j q_j (t_j - s_j) over the rest, with logits to base 2
        apart = column_sums(gap.mul_(q)) * (LOG_2 / q_sum)
        non_target = (apart - log_q + log_p).masked_fill(empty, 0.0)
        of_target = q_y * (log_q_y - log_p_y)
        fact = of_target + q_rest * (log_q_rest.clamp_min(_LOG_REST) - log_p_rest.clamp_min(_LOG_REST))
        kl = of_target + q_rest * (log_q_rest - log_p_rest + non_target)

        # Cross-entropy is over the whole catalogue at T = 1, history included.
        if temperature == 1.0:
            whole = torch.logaddexp(p_pool, outside.logsumexp(1))
            of_ce = weights.ce * torch.exp(log_p - whole)
        else:
            ce_block, ce_shift = self._all_but(h, target, columns)
            whole = torch.logaddexp(ce_shift + column_sums(ce_block).log(), s_y)
            of_ce = torch.zeros_like(whole)
        ce = whole - s_y

        # One coefficient a position for the rest's p and for its q, then what is not in the pool.
        of_p = weights.full_kl * p_rest / temperature + temperature * (weights.non_target + weights.fact * (q_y - p_y))
        of_q = weights.full_kl * q_rest / temperature + temperature * weights.non_target
        grad = p.mul_(((of_p + of_ce) / p_sum).to(p.dtype))
        if weights.full_kl or weights.non_target:
            grad.addcmul_(q, (of_q / q_sum).to(p.dtype), value=-1)
        if temperature == 1.0:
            grad[history] = (weights.ce * torch.exp(outside - whole[:, None]))[row, place].to(p.dtype)
        else:
            grad.addcmul_(ce_block, (weights.ce * torch.exp(ce_shift - whole)).to(p.dtype))
        of_y = weights.full_kl / temperature + temperature * weights.fact
        at_target = of_y * (p_y - q_y) + weights.ce * torch.expm1(-ce)
        square = temperature**2
        return grad, at_target, torch.stack([ce, square * fact, square * non_target, kl])

    def _all_but(self, h: Tensor, target: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Exponentials at T = 1 of all items but the target."""
        logits = log2_logits(h, self.items, self._block(3, len(h)))
        leave_out(logits, target, columns)
        return exponentials(logits, self._safe)


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
    with torch.autocast(states.device.type, enabled=False):  # the format of the products is the one asked for
        loss, values = _Distil.apply(
            states,
            table.float(),
            teacher_states,
            teacher_table.float(),
            targets,
            without_repeats(exclude, targets),
            weights,
            temperature,
            matmul_dtype(precision, states.device),
        )
    return loss, dict(zip(TERMS, values, strict=True))
