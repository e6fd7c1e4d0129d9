"""AdamW that moves only the rows of an embedding table that a step has touched."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RowAdamW(torch.optim.AdamW):
    """AdamW (fused) for dense gradients; for sparse ones, the touched rows and their moments alone.

    With a million items a dense step reads and writes the whole table and its two moments, most of it for nothing. Here the
    moments of a row rest until it is touched again, as in ``torch.optim.SparseAdam``, and so does its weight decay: over
    several steps this is another algorithm than AdamW. Where every row is touched in every step the two are equal.

    Args:
        params: as for :class:`torch.optim.AdamW`.
        kwargs: those of :class:`torch.optim.AdamW`; ``amsgrad`` and ``maximize`` are not for sparse gradients.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **{"fused": True, **kwargs})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes loss and gradients, as Lightning gives it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for parameter, _, _ in sparse:
            parameter.grad = None  # AdamW refuses it
        super().step()
        for parameter, gradient, group in sparse:
            self._move_rows(parameter, gradient.coalesce(), group)
            parameter.grad = gradient
        return loss

    def _move_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, rows, values = float(state["step"]), gradient.indices()[0], gradient.values()
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        scale = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        moved = parameter[rows].mul_(1 - group["lr"] * group["weight_decay"])
        parameter[rows] = moved.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))
