"""UniSRec: item vectors from text alone, a pre-trained sequence encoder, fine-tuned by its adaptor (KDD 2022)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.modules.state_check import check_state

MODES = {"inductive": "text", "transductive": "id+text"}


class UniSRec(SequentialRecommender):
    """UniSRec in one domain (Hou et al., arXiv 2206.05941): cosine logits, cross-entropy over the whole catalogue.

    An item's vector is ``MoE(x_i)``, a mixture of parametric-whitening experts over its text vector, and in the transductive
    mode ``MoE(x_i) + e_i`` with an embedding of its own. After :meth:`load_pretrained` the encoder stands still and only the
    adaptor, and the embeddings where there are any, are fine-tuned; without it everything is trained from scratch.

    Args:
        encoder: a module that keeps :class:`lightning_sfubm.contracts.Encoder`; ``None`` = ``SASRec()``.
        mode: ``"inductive"`` (text only, new items need no training) or ``"transductive"`` (text and ID).
        freeze_encoder: whether the encoder stands still once pre-trained weights are loaded.
        num_experts: whitening experts G of the adaptor.
        text_dropout: dropout of text vectors while training.
        tau: temperature of the cosine logits.
        id_scale: length of the ID embeddings at the start [choice: short beside the text vectors, or they would hide what
            the encoder was pre-trained on; as in the authors' code].
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up.
        logits_precision: number format of products against the whole catalogue.
        seed: root of the named streams.

    Raises:
        ConfigError: if a setting is unknown or out of range.

    Example:
        >>> model = UniSRec(mode="inductive")
        >>> model.bind(datamodule.catalogue)                          # doctest: +SKIP
        >>> model.load_pretrained(pretraining.shared_state())         # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        mode: Literal["inductive", "transductive"] = "inductive",
        freeze_encoder: bool = True,
        num_experts: int = 8,
        text_dropout: float = 0.2,
        tau: float = 0.07,
        id_scale: float = 0.1,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        logits_precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r} is unknown; choose one of {tuple(MODES)}.")
        if id_scale < 0:
            raise ConfigError(f"id_scale={id_scale} must not be negative.")
        encoder = SASRec() if encoder is None else encoder
        super().__init__(
            encoder,
            features=MODES[mode],  # type: ignore[arg-type]
            logits="cosine",
            tau=tau,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            num_experts=num_experts,
            text_dropout=text_dropout,
            logits_precision=logits_precision,
            seed=seed,
        )
        self.mode = mode
        self.freeze_encoder = freeze_encoder
        self.id_scale = id_scale
        self.is_pretrained = False

    def build(self, num_items: int, text_dim: int) -> None:
        """Create the adaptor and, in the transductive mode, the ID embeddings.

        Raises:
            ConfigError: if the catalogue has no text vectors.
        """
        super().build(num_items, text_dim)
        if self.items.ids is not None:
            self.items.ids.weight.data.mul_(self.id_scale)

    # ------------------------------------------------------------------ pre-trained weights

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Take adaptor and encoder of a pre-training and freeze the encoder where that is asked for.

        Args:
            state: :meth:`UniSRecPretraining.shared_state`, of the same encoder, text dimension and number of experts.

        Raises:
            ConfigError: if the module has no items yet.
            CheckpointError: if keys or shapes differ.
        """
        if not self.is_bound:
            raise ConfigError("UniSRec has no adaptor yet: call bind(catalogue) before load_pretrained.")
        own = transferable(self)
        check_state(own, state, "UniSRec")
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise CheckpointError("The pre-trained state of UniSRec holds values that are not finite.")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self._mark_pretrained()

    def _mark_pretrained(self) -> None:
        self.is_pretrained = True
        self.encoder.requires_grad_(not self.freeze_encoder)

    def checkpoint_shapes(self) -> dict[str, Any]:
        """Shapes of the tables, and whether pre-trained weights were loaded."""
        return {**super().checkpoint_shapes(), "is_pretrained": self.is_pretrained}

    def restore_shapes(self, shapes: Mapping[str, Any]) -> None:
        """Prepare for weights of a fine-tuned or a scratch model."""
        super().restore_shapes(shapes)
        if shapes["is_pretrained"]:
            self._mark_pretrained()


def transferable(module: SequentialRecommender) -> dict[str, nn.Parameter]:
    """Parameters of adaptor and encoder by name: what is the same in every domain."""
    assert module.items.adaptor is not None
    parts = {"adaptor": module.items.adaptor, "encoder": module.encoder}
    return {f"{part}.{name}": p for part, owner in parts.items() for name, p in owner.named_parameters()}
