"""Which precision pays on this machine."""

from pathlib import Path

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are done in hardware: CUDA from Ampere on, CPUs with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
