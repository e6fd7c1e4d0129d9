"""Next-item cross-entropy over the whole catalogue, without ever holding the V x N logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sfubm.modules.losses.precision import Precision, matmul_dtype, rows_per_chunk

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


def log_normaliser(logits: Tensor, probabilities: Tensor, column: Tensor) -> Tensor:
    """Log of the softmax denominator, read off one column: ``logit - log(probability)``.

    Args:
        logits: (V, N + 1).
        probabilities: (V, N + 1), the softmax of ``logits``.
        column: (V, 1), a column with a finite logit.

    Returns:
        (V,) float32. Rows whose probability there underflows are read at their largest logit instead.
    """
    logit, probability = logits.gather(1, column).float(), probabilities.gather(1, column).float()
    rows = (probability < TINY).squeeze(1).nonzero().squeeze(1)
    if len(rows):
        top, where = logits[rows].max(1, keepdim=True)
        logit[rows], probability[rows] = top.float(), probabilities[rows].gather(1, where).float()
    return (logit - probability.log()).squeeze(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy with its gradients computed in the forward pass, one block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        need_grad = states.requires_grad or table.requires_grad
        h, items = states.detach().to(dtype), table.detach().to(dtype)
        step = rows_per_chunk(len(table), dtype, states.device)
        grad_states = torch.empty_like(states) if need_grad else None
        grad_table = torch.zeros_like(table) if need_grad else None
        loss = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), step):
            block, target = h[start : start + step], targets[start : start + step, None]
            logits = block @ items.T
            logits[:, 0] = -torch.inf
            probabilities = torch.softmax(logits, 1)
            loss += (log_normaliser(logits, probabilities, target) - logits.gather(1, target).squeeze(1).float()).sum()
            if grad_states is not None and grad_table is not None:
                probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
                grad_states[start : start + step] = probabilities @ items
                grad_table += probabilities.T @ block
        if grad_states is not None and grad_table is not None:
            ctx.save_for_backward(grad_states.div_(len(states)), grad_table.div_(len(states)))
        return loss / len(states)

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
