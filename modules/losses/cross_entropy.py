"""Next-item cross-entropy over the whole catalogue, without ever holding the V x N logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sfubm.modules.losses.exponentials import (
    BlockMemory,
    TableGradient,
    block_steps,
    exponentials,
    leave_out,
    log2_logits,
    logits_are_safe,
    times,
)
from lightning_sfubm.modules.losses.precision import Precision, matmul_dtype, pad_rows
from lightning_sfubm.modules.losses.unit import unit


def cosine_inputs(states: Tensor, table: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Scale states and table so that their plain dot product is ``cosine / tau``.

    Args:
        states: (..., H).
        table: (..., H).
        tau: temperature, positive.

    Returns:
        States and table of the same shapes.
    """
    return unit(states) / tau, unit(table)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy with its gradients computed in the forward pass, one block of positions at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        need_grad = states.requires_grad or table.requires_grad
        count = len(states)
        h, targets = pad_rows(states.detach().float(), targets)
        targets = targets.clamp_min(1)
        vectors = table.detach()
        safe = logits_are_safe(h, vectors)
        items = vectors.to(dtype)
        # With ones appended, the sums of exponentials come out of the product with the item vectors. Its H + 1 rows are
        # laid out as the product reads them: H + 1 columns take it twice as long.
        with_ones = items.new_ones(items.shape[1] + 1, len(items))
        with_ones[:-1].copy_(items.T)  # alone it is copied in blocks, half as slow again with `cat`
        # The observed items are left out of the blocks and computed in float32.
        chosen = F.embedding(targets, vectors)
        observed = (h * chosen).sum(1)
        log_z, grad_states = torch.empty_like(observed), torch.empty_like(h)
        of_table, block_of, columns = TableGradient(items), BlockMemory(items), torch.arange(len(h), device=h.device)
        for rows in block_steps(len(h), len(items), dtype, h.device):
            width = rows.stop - rows.start
            logits = log2_logits(h[rows], items, out=block_of(0, width))
            leave_out(logits, targets[rows], columns[:width])
            block, shift = exponentials(logits, safe)
            sums = torch.mm(with_ones, block).T.float()
            log_z[rows] = torch.logaddexp(shift + sums[:, -1].log(), observed[rows])
            share = torch.exp(shift - log_z[rows])[:, None]
            grad_states[rows] = sums[:, :-1] * share
            if need_grad:
                of_table.add(block, (h[rows] * (share / count)).to(dtype))
        if need_grad:
            miss = torch.expm1(observed - log_z)[:, None]  # probability - 1
            grad_states += miss * chosen
            grad_table = of_table.total()
            grad_table.index_add_(0, targets, h * (miss / count))  # rows of padding are zero
            ctx.save_for_backward(grad_states[:count].div_(count).to(states.dtype), grad_table.to(table.dtype))
        return (log_z - observed)[:count].mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, grad_table = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return times(grad_states, grad) if needs[0] else None, times(grad_table, grad) if needs[1] else None, None, None


def full_cross_entropy(states: Tensor, table: Tensor, targets: Tensor, precision: Precision = "auto") -> Tensor:
    """Mean cross-entropy of the next item over all N items, chunked over positions.

    Memory is O(chunk x N + (V + N) x H); each logit is computed once, forward and backward together.

    Args:
        states: (V, H) states of the positions that predict something.
        table: (N + 1, H) item vectors; row 0 is padding and takes no probability.
        targets: (V,) item ids in ``1..N``.
        precision: format of the products, see :func:`~lightning_sfubm.modules.losses.precision.matmul_dtype`.

    Returns:
        Scalar loss in float32; 0 (with zero gradients) if V is 0.
    """
    if len(states) == 0:
        return states.sum() + 0.0 * table.sum()
    with torch.autocast(states.device.type, enabled=False):  # the format of the products is the one asked for
        return _ChunkedCrossEntropy.apply(states, table.float(), targets, matmul_dtype(precision, states.device))
