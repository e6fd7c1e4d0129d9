"""Which number format the large catalogue products are computed in."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.precision import has_fast_bf16

_fast_bf16 = cache(has_fast_bf16)  # asked in every step

Precision = Literal["auto", "fp32", "bf16"]

ROW_MULTIPLE = 16


def matmul_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Choose the format of products against the whole catalogue.

    ``"auto"`` takes bfloat16 where the hardware multiplies it natively (CUDA from compute capability 8, CPUs with
    AVX512-BF16 or AMX; about 2.5 times faster there) and float32 elsewhere. Sums are accumulated in float32 either way.

    Args:
        precision: ``"auto"``, ``"fp32"`` or ``"bf16"``.
        device: where the product is computed.

    Returns:
        ``torch.float32`` or ``torch.bfloat16``.

    Raises:
        ConfigError: if ``precision`` is anything else.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"logits_precision={precision!r} is unknown; choose 'auto', 'fp32' or 'bf16'.")
    if precision == "fp32" or (precision == "auto" and not _fast_bf16(device)):
        return torch.float32
    return torch.bfloat16


def rows_per_chunk(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a (rows, columns) block that stays in the cache (8 MiB), or 256 MiB on an accelerator."""
    budget = 8 << 20 if device.type == "cpu" else 256 << 20
    return max(ROW_MULTIPLE, budget // (columns * dtype.itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)


def pad_rows(*tensors: Tensor) -> list[Tensor]:
    """Append zero rows up to a multiple of 16.

    The number of positions differs from batch to batch, and the CPU library compiles and keeps a kernel for each size of
    a product: rounded up there are a dozen sizes instead of hundreds (100 MB less after some epochs, and faster ones).
    """
    return [torch.cat([t, t.new_zeros(-len(t) % ROW_MULTIPLE, *t.shape[1:])]) for t in tensors]
