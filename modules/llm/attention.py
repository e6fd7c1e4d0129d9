"""Scaled dot-product attention with a gradient of its own on CPUs, for models of transformers.

The forward pass is torch's. Its CPU kernel's backward pass exponentiates what the mask hides, for which the vectorised ``exp``
leaves its fast path: it takes eight to ten times as long as the forward one (33 and 4 ms for 8 rows of 160 tokens, 9 heads of
64, an Intel Xeon with AMX, one thread; this gradient 13). Here the probabilities are computed again by a softmax over all keys
and the rest is five batched products. Logits and softmax are float32, what is multiplied with them in the inputs' format.
"""

import inspect
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: how transformers knows it
NAME = "sdpa_own_gradient"
#: logits held at a time: rows of a batch are taken one after the other beyond
HELD_LOGITS = 2_000_000


def register() -> None:
    """Tell transformers of :func:`attention`, in every process that has a model which calls it."""
    from transformers import AttentionInterface, AttentionMaskInterface  # here: a second that no other command needs
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_own_gradient(model: Any) -> None:
    """Let a model's layers call :func:`attention`.

    An architecture that takes no other attention than its own stays as it is, and so does one that asks whether its attention
    is called ``sdpa``, for instance to choose the keys that are attended.

    Args:
        model: a pre-trained model of transformers that was loaded with ``sdpa``; changed in place.
    """
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (KeyError, OSError, TypeError):
        return
    if re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)[^\n]*sdpa", source):
        return
    register()
    model.set_attn_implementation(NAME)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, True = may be attended, as what is added to logits: 0 or -inf.

    Args:
        mask: of any shape.
        dtype: of the result.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class _Attention(torch.autograd.Function):
    """Queries (B, A, S, D) of A heads, keys and values (B, K, S', D) of K heads, each for A / K heads of queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _Attention._backward(ctx, *gradients)

    @staticmethod
    def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        heads, length = query.shape[1:3]
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        step = max(1, HELD_LOGITS // (heads * length * key.shape[2]))
        for start in range(0, len(query), step):
            rows = slice(start, start + step)
            shown = mask[rows] if len(mask) > 1 else mask
            given = (query[rows], key[rows], value[rows], gradient[rows], shown, ctx.scale)
            d_query[rows], d_key[rows], d_value[rows] = _gradients(*given)
        return d_query, d_key, d_value, None, None


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of a few rows."""
    rows, heads, length, width = query.shape
    groups, keys, wide = rows * key.shape[1], key.shape[2], value.shape[3]
    q, k = query.reshape(groups, -1, width), key.reshape(groups, keys, width)
    v, g = value.reshape(groups, keys, wide), gradient.reshape(groups, -1, wide)
    logits = torch.bmm(q.float() * scale, k.float().transpose(1, 2)).view(rows, heads, length, keys)
    shares = torch.softmax(logits.add_(mask), -1).to(q.dtype).view(groups, -1, keys)
    d_shares = torch.bmm(g, v.transpose(1, 2))
    d_logits = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype).mul_(scale)
    return (
        torch.bmm(d_logits, k).view_as(query),
        torch.bmm(d_logits.transpose(1, 2), q).view_as(key),
        torch.bmm(shares.transpose(1, 2), g).view_as(value),
    )


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: its own SDPA, but where a gradient on a CPU is wanted.

    Args:
        module: the layer's attention.
        query: (B, A, S, D).
        key: (B, K, S', D).
        value: (B, K, S', D').
        attention_mask: bool, True = may be attended, or additive, of a shape that broadcasts to (B, A, S, S'); ``None``: all
            earlier ones where the layer is causal. Where a query sees nothing, the gradient is torch's.
        options: ``dropout``, ``scaling`` and others of transformers' interface.

    Returns:
        (B, S, A, D'), and no weights.
    """
    if not _takes(query, key, value, attention_mask, options):
        return _plain(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    if torch.is_autocast_enabled("cpu"):  # rotated queries and keys come in float32; torch's own would be cast as well
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    is_bool = attention_mask.dtype == torch.bool
    mask = additive(attention_mask, query.dtype) if is_bool else attention_mask.to(query.dtype)
    if (mask.amax(-1) == -torch.inf).any():
        return _plain(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    out: Tensor = _Attention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def _plain(module: nn.Module, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *tensors, **options)  # type: ignore[arg-type]


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    plain = not any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
    plain = plain and all(options.get(name) is None for name in ("position_bias", "cache"))
    formats = torch.is_autocast_enabled("cpu") or query.dtype == key.dtype == value.dtype
    fits = mask is not None and mask.ndim == 4 and not mask.requires_grad and query.shape[2] > 1
    return wanted and plain and formats and fits and query.device.type == "cpu"
