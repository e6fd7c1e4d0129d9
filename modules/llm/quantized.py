"""Base weights of 8 or 4 bits, for language models that are too large for a device in bf16."""

import logging
from typing import Any

import torch

from lightning_sfubm.errors import ConfigError

# PEFT imports bitsandbytes where it is installed, which then warns of a kernel it could fetch; its 8-bit layers warn
# at every step.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

#: precisions in which the frozen base is quantised; adapters, projectors and head stay in fp32
QUANTIZED = ("8bit", "4bit")


def quantization_config(precision: str, compute: torch.dtype) -> Any:
    """How ``from_pretrained`` quantises the linear layers of a model while it loads them.

    Embeddings, norms and the vocabulary head are left as they are.

    Args:
        precision: ``8bit`` (LLM.int8, Dettmers et al., arXiv 2208.07339) or ``4bit`` (NF4 with quantised constants,
            as in QLoRA, arXiv 2305.14314).
        compute: number format of 4-bit layers' products.

    Returns:
        A transformers ``BitsAndBytesConfig``.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"LLM precision '{precision}' needs the package 'bitsandbytes': pip install 'lightning-sfubm[quantized]'"
        ) from None
    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights in evaluation, after which no gradient passes them."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (nn.Module's attributes are tensors to mypy)
