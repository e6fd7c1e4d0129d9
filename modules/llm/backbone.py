"""A causal language model as the LLM stage sees it: embeddings in, last hidden states and logits out."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.llm.attention import NAME, additive, register, use_own_gradient
from lightning_sfubm.modules.llm.norms import use_frozen_norms
from lightning_sfubm.modules.llm.opening import check_precision, open_config, with_adapters
from lightning_sfubm.modules.llm.quantized import QUANTIZED, keep_gradients, quantization_config
from lightning_sfubm.precision import has_fast_bf16

#: tokens that a CPU computes at a time without gradients: a large batch in parts is faster, as it stays in the caches
CPU_TOKENS = 1400

#: dropouts of the frozen base: it is a fixed function; only adapters have dropout
DROPOUTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "layerdrop",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


class Backbone(nn.Module):
    """A frozen causal LM, cut to its first layers if asked, with or without low-rank adapters.

    Args:
        llm: an embedded default, a local folder or a hub id.
        num_layers: keep the first n decoder layers; ``None`` keeps all.
        precision: ``"32"``, ``"bf16"`` (base weights in bf16, computation under bf16 autocast, residual stream and
            adapters in fp32), ``"auto"``: bf16 where the hardware has it, or ``"8bit"`` or ``"4bit"``: linear layers of
            the base quantised by bitsandbytes (extra ``quantized``), all else as with ``"auto"``.
        adapter_rank: rank of the LoRA adapters (Hu et al., arXiv 2106.09685); 0 leaves the model frozen.
        adapter_alpha: LoRA scale is ``adapter_alpha / adapter_rank``.
        adapter_dropout: dropout in front of the adapters.
        adapter_targets: ``all-linear`` or a regular expression over module names.
        activation_checkpointing: keep the input of each decoder layer alone in training and compute the rest again for the
            gradient (Chen et al., arXiv 1604.06174).

    Attributes:
        tokenizer: the model's tokenizer.
        embedding_dim: d, width of the token embeddings.
        hidden_dim: width of the last hidden states (differs from d in some models).
        token_norm: mean norm of the token embeddings.
        quantized: whether the base has weights of 8 or 4 bits.
    """

    def __init__(
        self,
        llm: str,
        num_layers: int | None = None,
        precision: str = "auto",
        adapter_rank: int = 0,
        adapter_alpha: int = 32,
        adapter_dropout: float = 0.1,
        adapter_targets: str = "all-linear",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_precision(precision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = precision == "bf16" or (precision != "32" and has_fast_bf16(device))
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        quantization = quantization_config(precision, dtype) if precision in QUANTIZED else None
        model, self.tokenizer = _load(llm, num_layers, dtype, quantization)
        model.requires_grad_(False)
        keep_gradients(model)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()  # under autocast its input is fp32, and a CPU takes no weights of another precision
        use_frozen_norms(model, cast=self.bf16 and quantization is None)
        if activation_checkpointing:
            _checkpoint_activations(model, llm)
        self.config = model.config
        self.llm = llm
        self.quantized = quantization is not None
        self.hidden_dim = int(model.get_output_embeddings().weight.shape[1])
        with torch.no_grad():
            words = model.get_input_embeddings()
            # a quantised base is on the GPU from the start
            embedded = words(torch.arange(0, words.num_embeddings, 7, device=words.weight.device)).float()
        self.embedding_dim = int(embedded.shape[1])
        self.token_norm = float(embedded.norm(dim=-1).mean())
        # now: later the weights may be divided among processes
        self._fingerprint, self._weights_sample = _fingerprint(model), "" if quantization else _weights_sample(model)
        self.model: Any = model
        if adapter_rank > 0:
            self.model = with_adapters(model, adapter_rank, adapter_alpha, adapter_dropout, adapter_targets)
        if self.bf16 and quantization is None:
            for module in self.model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):  # to fp32, from which autocast would turn it back
                    module.cast_input_dtype_enabled = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As for any module, and its attention is known to transformers in the process that reads it."""
        super().__setstate__(state)
        register()

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself, adapters (if any) in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """bf16 autocast where the backbone computes in bf16, whatever the Trainer's precision."""
        with torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (B, S, d) in fp32; soft-token codes (negative) get the embedding of id 0."""
        return self.causal_lm.get_input_embeddings()(tokens.clamp_min(0)).float()

    def states(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """Last hidden states.

        Args:
            embeddings: (B, S, d).
            mask: (B, 1, S, S) bool, True = may be attended, or (B, S') bool over cached and new tokens.
            positions: (B, S) position of each token in its own sequence.
            cache: a transformers cache; it is extended in place.

        Returns:
            (B, S, hidden_dim) float32.
        """
        rows = self._rows_at_a_time(embeddings, cache)
        if rows >= len(embeddings):
            return self._pass(embeddings, mask, positions, cache)
        parts: list[Tensor] = []
        caches: list[Any] = []
        for start in range(0, len(embeddings), rows):
            part = slice(start, start + rows)
            own = None if cache is None else type(cache)(config=self.causal_lm.base_model.config)
            parts.append(self._pass(embeddings[part], mask[part], positions[part], own))
            caches.append(own)
        for index in range(0 if cache is None else len(caches[0].layers)):
            layers = [own.layers[index] for own in caches]
            cache.update(torch.cat([one.keys for one in layers]), torch.cat([one.values for one in layers]), index)
        return torch.cat(parts)

    def _rows_at_a_time(self, embeddings: Tensor, cache: Any) -> int:
        """All rows, or fewer on a CPU where no gradient is wanted. Divided models gather weights by pass: all rows."""
        count, length = embeddings.shape[:2]
        rows = max(1, CPU_TOKENS // length)
        if rows >= count or embeddings.device.type != "cpu" or torch.is_grad_enabled():
            return count
        divided = any(isinstance(module, FSDPModule) for module in self.modules())
        return rows if not divided and (cache is None or _is_empty(cache)) else count

    def _pass(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        decoder = self.causal_lm.base_model
        attention = self._full_mask(mask, positions) if mask.ndim == 4 else mask.long()
        if cache is not None and self._decodes_on_cpu(embeddings, mask):
            # Given as it is, the mask is used even where it hides nothing. Without one, torch takes its grouped-head kernel,
            # five times as slow in bf16 for one query a row.
            attention = mask[:, None, None, :]
        with self.autocast():
            output = decoder(
                inputs_embeds=embeddings,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state.float()

    def _decodes_on_cpu(self, embeddings: Tensor, mask: Tensor) -> bool:
        """Whether this is one more token of each row, all earlier ones in sight."""
        sdpa = "sdpa" in self.config._attn_implementation
        one = embeddings.shape[1] == 1 and embeddings.device.type == "cpu" and mask.ndim == 2
        return one and sdpa and getattr(self.config, "sliding_window", None) is None

    def _full_mask(self, mask: Tensor, positions: Tensor) -> Any:
        """The mask in the form the model wants: additive where attention is not SDPA, one per kind of layer, windowed."""
        window = getattr(self.config, "sliding_window", None)
        near = None
        if window is not None:
            near = mask & ((positions.unsqueeze(-1) - positions.unsqueeze(1)) < window).unsqueeze(1)
        kinds = getattr(self.config, "layer_types", None)
        if kinds and "sliding_attention" in kinds:
            return {"full_attention": self._native(mask), "sliding_attention": self._native(near)}
        uses_window = near is not None and kinds is None and getattr(self.config, "use_sliding_window", True)
        return self._native(near if uses_window else mask)

    def _native(self, mask: Any) -> Tensor:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        if "sdpa" in self.config._attn_implementation:
            own = self.config._attn_implementation == NAME and mask.device.type == "cpu" and torch.is_grad_enabled()
            return additive(mask, dtype) if own else mask  # once, not in every layer
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def logits(self, states: Tensor) -> Tensor:
        """Vocabulary logits (..., V) for chosen states (..., hidden_dim), computed in the precision of the backbone.

        Returned in fp32; call it on few positions only.
        """
        with self.autocast():
            logits = self.causal_lm.get_output_embeddings()(states.to(self._head_dtype))
        return self._scaled(logits.float())

    def refined(self, coarse: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
        """Logits (rows, K) of some tokens as fp32 arithmetic gives them.

        bf16 keeps eight bits: a logit between 16 and 32 is a multiple of 1/8, and the best two of a vocabulary are often equal.

        Args:
            coarse: (rows, K) their logits by :meth:`logits`; returned as they are where fp32 has no more to say, where they are
                infinite (masked), and where the head's weights are not at hand whole (divided among processes, quantised).
            states: (rows, hidden_dim) that they are of.
            tokens: (rows, K) ids.
        """
        head = self.causal_lm.get_output_embeddings()
        weight = head.weight
        if not self.bf16 or type(head) is not nn.Linear or type(weight) is not nn.Parameter or weight.ndim != 2:
            return coarse
        with torch.autocast(states.device.type, enabled=False):
            rows = nn.functional.embedding(tokens, weight).float()
            exact = torch.einsum("vkh,vh->vk", rows, states.float())
            if head.bias is not None:
                exact = exact + head.bias[tokens].float()
        return torch.where(coarse.isinf(), coarse, self._scaled(exact))

    def _scaled(self, logits: Tensor) -> Tensor:
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and later
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def _head_dtype(self) -> torch.dtype:
        return self.causal_lm.get_output_embeddings().weight.dtype

    def fingerprint(self) -> str:
        """Tells base models apart: shape of the architecture and a sample of the embedding weights."""
        return self._fingerprint

    def weights_sample(self) -> str:
        """Tells apart base models of the same embeddings, such as one with adapters merged; "" where quantised."""
        return self._weights_sample


def _is_empty(cache: Any) -> bool:
    """Whether this is a new cache that keeps all tokens (a sliding window's layers count what they have dropped)."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    kinds = {type(layer) for layer in cache.layers}
    return type(cache) is DynamicCache and kinds <= {DynamicLayer} and cache.get_seq_length() == 0


def _fingerprint(model: Any) -> str:
    shape = {key: getattr(model.config, key, None) for key in ("model_type", "hidden_size", "num_hidden_layers")}
    sample = model.get_input_embeddings().weight[:64].detach().to("cpu", torch.bfloat16).view(torch.int16)
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _weights_sample(model: Any) -> str:
    samples = [
        p.detach()[0, :64].to("cpu", torch.bfloat16).view(torch.int16) for p in model.parameters() if p.ndim == 2
    ]
    return hashlib.sha256(b"".join(sorted(sample.contiguous().numpy().tobytes() for sample in samples))).hexdigest()[
        :24
    ]


def _load(llm: str, num_layers: int | None, dtype: torch.dtype, quantization: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    folder, config, tokenizer = open_config(llm, num_layers)
    for name in DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    settings = {"config": config, "dtype": dtype, "use_safetensors": True}  # a .bin file is a pickle
    if quantization is not None:
        settings["quantization_config"] = quantization
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the load report would list every weight of the layers left out
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **settings)
        except ValueError:  # architectures without SDPA
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **settings)
        else:
            use_own_gradient(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{llm}' cannot be loaded as a causal LM: {' '.join(str(error).split())}") from error
    finally:
        logger.setLevel(level)
    return model.eval(), tokenizer


def _checkpoint_activations(model: Any, llm: str) -> None:
    # the name before transformers 5.20 is deprecated since
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"'{llm}' cannot compute its layers again ({' '.join(str(error).split())}); leave out activation_checkpointing"
        ) from error
