"""Tiny random language models in folders of their own: for tests, dry runs and debugging, without any download."""

from pathlib import Path
from typing import Any

import torch

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import seeded

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = (
    "user",
    "of",
    "service",
    "film",
    "item",
    "watched",
    "these",
    "next",
    "will",
    "oldest",
    "first",
    "The",
    "answer",
)


def _tokenizer() -> Any:
    """Byte-level BPE without merges but for a few words: any text can be written, nothing is trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "\u0120"  # how byte-level BPE writes a space
        for letter in word:
            if left + letter not in vocabulary:
                vocabulary[left + letter] = len(vocabulary)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_tiny_llm(
    folder: str | Path,
    architecture: str = "llama",
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Write a random causal LM of width 32 and its tokenizer.

    Args:
        folder: is created.
        architecture: ``llama``, ``mistral``, ``qwen2``, ``gemma3``, ``gpt2``, ``opt``, ``bloom``, ``gpt_neo`` (an even number
            of layers) or ``mamba``.
        layers: decoder layers.
        seed: of the weights.
        dtype: of the weights.
        settings: entries of the transformers config to override; a ``vocab_size`` above the tokenizer's few hundred words
            gives vectors that no text asks for.

    Returns:
        The folder, to be given as ``llm``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    modern = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    }
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", modern),
        "mistral": ("mistral", {**modern, "sliding_window": 16}),
        "qwen2": ("qwen2", modern),
        "gemma3": (
            "gemma3_text",
            {
                **modern,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * (layers // 2)
                + ["full_attention"] * (layers % 2),
            },
        ),
        "gpt2": ("gpt2", {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 2048}),
        "opt": (
            "opt",
            {
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 16,
                "max_position_embeddings": 2048,
            },
        ),
        "bloom": ("bloom", {"hidden_size": 32, "n_layer": layers, "n_head": 4}),
        "gpt_neo": (
            "gpt_neo",
            {
                "hidden_size": 32,
                "num_layers": layers,
                "num_heads": 4,
                "attention_types": [[["global", "local"], layers // 2]],
                "window_size": 256,
                "max_position_embeddings": 2048,
            },
        ),
        "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": layers, "state_size": 8}),
    }
    if architecture not in kinds:
        raise ConfigError(f"architecture '{architecture}' is not one of {sorted(kinds)}")
    model_type, own = kinds[architecture]
    config = AutoConfig.for_model(model_type, **{**common, **own, **settings})
    with seeded(seed, "tiny llm", architecture):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # the usual .02 would make every state nearly equal at this width
                torch.nn.init.normal_(parameter, std=0.2 if "norm" not in name else 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_tiny_text_encoder(folder: str | Path, dim: int = 32, seed: int = 0) -> Path:
    """Write a random BERT of the given width with a character tokenizer, to be given to ``HFTextEncoder``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=2 * dim,
        max_position_embeddings=512,
    )
    with seeded(seed, "tiny text encoder"):
        model = BertModel(config)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return Path(folder)
