"""Next-item cross-entropy over the whole catalogue, without ever holding the V x N logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sfubm.modules.losses.precision import Precision, matmul_dtype, pad_rows, rows_per_chunk

TINY = 1e-30


def cosine_inputs(states: Tensor, table: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Scale states and table so that their plain dot product is ``cosine / tau``.

    Args:
        states: (..., H).
        table: (..., H).
        tau: temperature, positive.

    Returns:
        States and table of the same shapes.
    """
    return F.normalize(states, dim=-1) / tau, F.normalize(table, dim=-1)


def softmax_in_place(logits: Tensor, states: Tensor, items: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite a block of logits with its softmax and keep what the loss needs of them.

    The denominator is read off one column, ``log z = logit - log(probability)``: no further pass over the block.

    Args:
        logits: (c, N + 1) = ``states @ items.T``, holds the probabilities afterwards.
        states: (c, H).
        items: (N + 1, H).
        column: (c,) a column with a finite logit in each row.

    Returns:
        The logit at ``column`` and log z, each (c,) float32. Rows whose probability there underflows are read at their
        most probable column instead.
    """
    rows = torch.arange(len(logits), device=logits.device)
    logit = logits[rows, column].float()
    torch.softmax(logits, 1, out=logits)
    probability = logits[rows, column].float()
    log_z = logit - probability.log()
    lost = (probability < TINY).nonzero().squeeze(1)
    if len(lost):
        top, where = logits[lost].max(1)
        log_z[lost] = (states[lost].float() * items[where].float()).sum(1) - top.float().log()
    return logit, log_z


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy with its gradients computed in the forward pass, one block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        need_grad = states.requires_grad or table.requires_grad
        count = len(states)
        h, targets = pad_rows(states.detach().to(dtype), targets)
        items = table.detach().to(dtype)
        step = rows_per_chunk(len(table), dtype, states.device)
        grad_states = states.new_empty(h.shape) if need_grad else None
        grad_table = torch.zeros_like(table) if need_grad else None
        loss = states.new_zeros((), dtype=torch.float32)
        # One block for all chunks, used in place: fresh ones of this size cost more in page faults than the softmax.
        block, product = h.new_empty(min(step, len(h)), len(items)), torch.empty_like(items)
        for start in range(0, len(h), step):
            chunk, target, real = h[start : start + step], targets[start : start + step], max(count - start, 0)
            logits = torch.mm(chunk, items.T, out=block[: len(chunk)])
            logits[:, 0] = -torch.inf
            logit, log_z = softmax_in_place(logits, chunk, items, target.clamp_min(1))
            loss += (log_z - logit)[:real].sum()
            if grad_states is not None and grad_table is not None:
                rows = torch.arange(len(chunk), device=h.device)
                logits[rows, target] = torch.expm1(logit - log_z).to(dtype)
                logits[real:] = 0.0  # rows of padding
                grad_states[start : start + step] = logits @ items
                grad_table += torch.mm(logits.T, chunk, out=product)
        if grad_states is not None and grad_table is not None:
            ctx.save_for_backward(grad_states[:count].div_(count), grad_table.div_(count))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, grad_table = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return grad_states * grad if needs[0] else None, grad_table * grad if needs[1] else None, None, None


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
    return _ChunkedCrossEntropy.apply(states, table, targets, matmul_dtype(precision, states.device))
