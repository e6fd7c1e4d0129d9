"""Root-mean-square norms of a frozen model, on CPUs with a gradient of their own.

What transformers writes out in single operations passes over the activations some twenty times there and back. With weights
that are not trained the gradient is three products and a sum: 7 ms for 24 (8 rows of 185 tokens, 576 wide, an Intel Xeon, one
thread).
"""

from typing import Any

import torch
from torch import Tensor, nn

#: architectures whose layers read ``input_layernorm`` and ``post_attention_layernorm`` by linear layers alone
NORMS_TO_LINEAR = ("llama", "mistral", "qwen2", "qwen3")


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` of the last dimension, in float32; gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide = x.float()
        weighed = gradient * weight.float()
        along = torch.linalg.vecdot(weighed, wide).unsqueeze(-1)
        out = weighed.mul_(scale).addcmul_(wide, along * scale.pow(3) / -x.shape[-1])
        return out.to(x.dtype), None, None, None


class FrozenRMSNorm(nn.Module):
    """A norm of transformers whose weight is not trained.

    Args:
        weight: (H,).
        eps: added to the mean of squares.
        dtype: of the output; ``None`` = as transformers has it, the wider one of input and weight.
    """

    def __init__(self, weight: nn.Parameter, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        dtype = self.dtype or torch.result_type(x, self.weight)
        if x.device.type == "cpu" and not self.weight.requires_grad:
            out: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
            return out
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)).to(
            dtype
        )

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{len(self.weight)}, eps={self.eps}"


def use_frozen_norms(model: Any, cast: bool) -> None:
    """Put :class:`FrozenRMSNorm` in the place of those norms of a model that compute the same.

    Args:
        model: a pre-trained model of transformers, not yet trained or divided; changed in place. Names of weights stay.
        cast: let norms that linear layers alone read (:data:`NORMS_TO_LINEAR`) give bf16. The residual stream is fp32 and so
            are the norms of it; under autocast every linear layer would cast what it is given, instead of the norm once.
    """
    cast = cast and model.config.model_type in NORMS_TO_LINEAR
    for name, module in list(model.named_modules()):
        if (frozen := _same(module)) is not None:
            if cast and name.endswith((".input_layernorm", ".post_attention_layernorm")):
                frozen.dtype = torch.bfloat16
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, frozen)


@torch.no_grad()
def _same(module: nn.Module) -> FrozenRMSNorm | None:
    """The norm in its place, where it is one by name and computes the same of a few numbers (some add 1 to their weight)."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    parameters = dict(module.named_parameters())
    if not (type(module).__name__.endswith("RMSNorm") and list(parameters) == ["weight"] and isinstance(eps, float)):
        return None
    if parameters["weight"].ndim != 1:
        return None
    frozen = FrozenRMSNorm(parameters["weight"], eps)
    x = torch.linspace(-2, 3, 2 * len(frozen.weight), dtype=torch.float32, device=frozen.weight.device).view(2, -1)
    try:
        same = torch.allclose(module(x).float(), frozen(x).float(), rtol=1e-4, atol=1e-5)
    except (TypeError, ValueError, RuntimeError):
        return None  # it takes more than an input, or gives something else
    return frozen if same else None
