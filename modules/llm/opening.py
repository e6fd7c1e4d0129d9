"""Configuration, tokenizer and adapters of a causal language model, and whether they fit before its weights are read."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lightning_sfubm.assets import resolve_model
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.llm.quantized import QUANTIZED, quantization_config


def open_config(llm: str, num_layers: int | None) -> tuple[Path, Any, Any]:
    """Folder, transformers configuration and tokenizer of a model, cut to its first layers.

    Args:
        llm: an embedded default, a local folder or a hub id, which is fetched.
        num_layers: keep the first n decoder layers; ``None`` keeps all.

    Raises:
        ConfigError: it is no model of text alone, or has fewer layers.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve_model(llm)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{llm}' holds no usable model config or tokenizer: {' '.join(str(error).split())}"
        ) from error
    if not hasattr(config, "num_hidden_layers"):
        raise ConfigError(
            f"'{llm}' ({config.model_type}) is a model of several parts, such as text and images; give one of text alone"
        )
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ConfigError(f"num_layers must lie in 1..{config.num_hidden_layers} for '{llm}', got {num_layers}")
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
        config.layers_left_out = config.num_hidden_layers - num_layers
        config.num_hidden_layers = num_layers
    return Path(folder), config, tokenizer


def check_precision(precision: str) -> None:
    """Refuse a number format that is unknown, or needs a package that is not there.

    Raises:
        ConfigError: naming the precision.
    """
    if precision not in ("auto", "bf16", "32", *QUANTIZED):
        raise ConfigError(f"LLM precision '{precision}' is not one of auto, bf16, 32, 8bit, 4bit")
    if precision in QUANTIZED:
        quantization_config(precision, torch.bfloat16)


def with_adapters(model: Any, rank: int, alpha: int, dropout: float, targets: str) -> Any:
    """The model with low-rank adapters in place.

    Raises:
        ConfigError: no module of it is called as ``targets`` says.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"adapter_targets '{targets}': {' '.join(str(error).split())}") from error


def check_model(llm: str, num_layers: int | None, precision: str, adapter_rank: int, adapter_targets: str) -> None:
    """Refuse what :class:`~lightning_sfubm.modules.llm.backbone.Backbone` could not be made of, in milliseconds.

    Its files are looked at: neither weights nor transformers are loaded.

    Args:
        llm: see there.
        num_layers: see there.
        precision: see there.
        adapter_rank: see there; 0 for none.
        adapter_targets: see there.

    Raises:
        ConfigError: naming the setting.
    """
    check_precision(precision)
    folder = Path(resolve_model(llm))
    try:
        layers = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"'{llm}' holds no usable model config: {' '.join(str(error).split())}") from error
    if num_layers is not None and not 1 <= num_layers <= (num_layers if layers is None else layers):
        raise ConfigError(f"num_layers must lie in 1..{layers} for '{llm}', got {num_layers}")
    names: set[str] = set()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(str(path), framework="numpy") as file:
                names.update(name.rpartition(".")[0] for name in file.keys())  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{llm}' cannot be loaded as a causal LM: {' '.join(str(error).split())}") from error
    if not names:
        raise ConfigError(f"'{llm}' cannot be loaded as a causal LM: {folder} holds no weights (*.safetensors)")
    if adapter_rank > 0 and adapter_targets != "all-linear":
        try:  # as PEFT does; some files leave out the name of the outermost part
            found = any(re.fullmatch(adapter_targets, prefix + name) for name in names for prefix in ("", "model."))
        except re.error as error:
            raise ConfigError(f"adapter_targets '{adapter_targets}' is no regular expression: {error}") from error
        if not found:
            raise ConfigError(f"adapter_targets '{adapter_targets}' names no part of '{llm}', such as '{min(names)}'")
