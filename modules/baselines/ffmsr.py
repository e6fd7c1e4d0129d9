"""FFMSR: federated clusters of item texts, read beside ID and local text through filters and gates (arXiv 2503.23026)."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch, TrainBatch
from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.modules.baselines.ffmsr_items import FFMSRItems, ItemVectors
from lightning_sfubm.modules.encoders.acceptance import encoder_width
from lightning_sfubm.modules.encoders.filter_mixer import CausalFilter, FilterLayer
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES, text_affinities
from lightning_sfubm.modules.losses.cross_entropy import cosine_inputs, full_cross_entropy
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.losses.ranks import mean_over_ranks
from lightning_sfubm.modules.settings import check_dropout
from lightning_sfubm.modules.stage1 import CatalogueModule
from lightning_sfubm.modules.state_check import check_state
from lightning_sfubm.ranks import needs_every_gradient

PHASES = ("federated", "finetune")


def orthogonality(left: Tensor, right: Tensor) -> Tensor:
    """How much two views of the same items share: mean squared entry of the product of their normalised tables.

    The authors' term; for independent views it is about N / H^2, so it weighs more the smaller H is. As there, the lengths
    of the rows get no gradient.

    Args:
        left: (N + 1, H), row 0 zero.
        right: (N + 1, H), row 0 zero.

    Returns:
        Scalar, 0 where each dimension of one is orthogonal to each of the other.
    """
    first, second = (table / (table.detach().norm(dim=1, keepdim=True) + 1e-6) for table in (left, right))
    return (first.T @ second).square().mean()


class FFMSR(CatalogueModule):
    """FFMSR in one client (Lu et al., arXiv 2503.23026). Implements ``FederatedModule``, ``CatalogueRanker`` and ``Stage1``.

    A client uploads one vector per item, its text as the last layers of a language model have it, weighed by attention. The
    server clusters all uploads and answers each item with its centroid (``KMeans``); nothing else is exchanged. The centroids,
    adapted, are "prompts": filtered along the history they are added to the encoder's input, gated to the items that
    states are compared with. Phases: ``"federated"`` during the rounds, ``"finetune"`` after them, both train everything;
    fine-tuning also keeps the prompts apart from the IDs.

    Args:
        encoder: a module that keeps :class:`lightning_sfubm.contracts.Encoder`, behind the filters; ``None`` = ``SASRec()``.
        text_layers: layers that lie side by side in the catalogue's text vectors (``layers`` of the text encoder).
        attention: weigh the layers by attention; ``False`` is the ablation ``no_att``, all layers alike.
        filters: filter prompts and inputs along the history; ``False`` is the ablation ``no_filter``.
        gate: gate between ID and text; ``False`` is the ablation ``no_gate``.
        num_filters: filter layers before the encoder.
        filter_dropout: dropout within the filter layers.
        max_length: longest history the filters accept, in items.
        num_experts: whitening experts of each adaptor.
        text_dropout: dropout of text vectors while training.
        tau: temperature of the cosine logits.
        w_orthogonal: weight of :func:`orthogonality` between text and IDs, and of that between prompts and IDs.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up, per phase.
        phase: phase to start in.
        logits_precision: number format of products against the whole catalogue.
        seed: root of the named streams.

    Raises:
        ConfigError: if a setting is unknown or out of range.

    Example:
        >>> from lightning_sfubm.modules.encoders.sasrec import SASRec
        >>> model = FFMSR(SASRec(hidden_dim=64), text_layers=3)
    """

    method_name = "FFMSR"  #: what tables call the method
    affinity_names = ("score", *TEXT_AFFINITIES)

    def __init__(
        self,
        encoder: nn.Module | None = None,
        text_layers: int = 3,
        attention: bool = True,
        filters: bool = True,
        gate: bool = True,
        num_filters: int = 2,
        filter_dropout: float = 0.2,
        max_length: int = 50,
        num_experts: int = 8,
        text_dropout: float = 0.2,
        tau: float = 0.07,
        w_orthogonal: float = 1.0,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        phase: Literal["federated", "finetune"] = "federated",
        logits_precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        encoder = SASRec() if encoder is None else encoder
        super().__init__(encoder_width(encoder), lr, weight_decay, warmup_steps)
        if text_layers < 1 or num_filters < 0 or max_length < 1:
            raise ConfigError(
                f"text_layers={text_layers} and max_length={max_length} must be at least 1, "
                f"num_filters={num_filters} at least 0."
            )
        if tau <= 0 or w_orthogonal < 0:
            raise ConfigError(f"tau={tau} must be positive and w_orthogonal={w_orthogonal} not negative.")
        check_dropout(type(self).__name__, text_dropout=text_dropout, filter_dropout=filter_dropout)
        self.save_plain_hyperparameters()
        self.encoder = encoder
        self.text_layers = text_layers
        self.attention = attention
        self.gate = gate
        self.num_experts = num_experts
        self.text_dropout = text_dropout
        self.tau = tau
        self.w_orthogonal = w_orthogonal
        self.logits_precision: Precision = logits_precision
        self.seed = seed
        self.prompt_filter = CausalFilter(self.hidden_dim, max_length) if filters else None
        count = num_filters if filters else 0
        layers = [FilterLayer(self.hidden_dim, max_length, filter_dropout) for _ in range(count)]
        for layer in layers:
            # Rows as long as item vectors: the encoder adds positions of that length, which longer rows would drown.
            nn.init.constant_(layer.norm.weight, 1.0 / math.sqrt(self.hidden_dim))
        self.filter_layers = nn.ModuleList(layers)
        self.set_phase(phase)

    # ------------------------------------------------------------------ item tables

    def build(self, num_items: int, text_dim: int) -> None:
        """Create the item tables.

        Raises:
            ConfigError: if the catalogue has no text vectors, or ``text_layers`` does not divide their length.
        """
        if not text_dim:
            raise ConfigError("FFMSR needs text vectors, but the datamodule has no text encoder.")
        if text_dim % self.text_layers:
            raise ConfigError(
                f"FFMSR: text vectors of {text_dim} dimensions cannot be text_layers={self.text_layers} layers side by side; "
                "set it to the text encoder's 'layers'."
            )
        self.items = FFMSRItems(
            num_items,
            self.hidden_dim,
            text_dim,
            self.text_layers,
            self.attention,
            self.gate,
            self.num_experts,
            self.text_dropout,
            self.seed,
            self.logits_precision,
        )

    def load_catalogue(self, catalogue: Catalogue) -> None:
        """Take the text vectors of the catalogue.

        Raises:
            ConfigError: if they are not those of ``text_layers`` layers.
        """
        assert catalogue.text_embeddings is not None
        self.items.load_text(catalogue.text_embeddings)

    def checkpoint_shapes(self) -> dict[str, Any]:
        """Shapes of the tables, the phase and whether the server's vectors have been received."""
        return {**super().checkpoint_shapes(), "phase": self.phase, "received": self.items.global_text is not None}

    def restore_shapes(self, shapes: Mapping[str, Any]) -> None:
        """Prepare for weights written in the given phase."""
        super().restore_shapes(shapes)
        if shapes["received"]:
            self.items.allocate_global()
        self.set_phase(shapes["phase"])

    # ------------------------------------------------------------------ training

    @property
    def local_phases(self) -> tuple[str, ...]:
        """Fine-tuning on the domain's own data."""
        return ("finetune",)

    @property
    def round_phase(self) -> str:
        """The phase of the federated rounds."""
        return "federated"

    def set_phase(self, phase: str) -> None:
        """Choose what the next epochs train.

        Args:
            phase: ``"federated"`` or ``"finetune"``.

        Raises:
            ConfigError: if the phase is unknown.
        """
        if phase not in PHASES:
            raise ConfigError(f"phase={phase!r} is unknown; choose one of {PHASES}.")
        self.phase = phase

    def on_fit_start(self) -> None:
        """Refuse a strategy that could take no step.

        Raises:
            ConfigError: it waits for a gradient of every parameter, and no vectors were received for the global adaptor.
        """
        if self.items.global_text is None and needs_every_gradient(self.trainer.strategy):
            raise ConfigError(
                "FFMSR's global adaptor gets no gradient before a federation has sent centroids, which trainer.strategy does "
                "not look for: set it to ddp_find_unused_parameters_true"
            )

    def _states(self, history: Tensor, items: ItemVectors) -> Tensor:
        """States (B, L, H) of histories (B, L)."""
        mask = history != 0
        prompts = F.embedding(history, items.prompts, padding_idx=0)
        x = F.embedding(history, items.inputs, padding_idx=0)
        x = x + (prompts if self.prompt_filter is None else self.prompt_filter(prompts))
        for layer in self.filter_layers:
            x = layer(x, mask)
        return self.encoder(x, mask)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the next item at every position that has one, and the terms that keep the views apart."""
        items, ids = self.items(), self.items.ids.weight
        predicting = batch["targets"] != 0
        states, table = cosine_inputs(self._states(batch["history"], items)[predicting], items.outputs, self.tau)
        terms = {"ce": full_cross_entropy(states, table, batch["targets"][predicting], self.logits_precision)}
        loss = mean_over_ranks(terms["ce"], len(states))
        if self.w_orthogonal:
            terms["orthogonal_text"] = orthogonality(items.text, ids)
            loss = loss + self.w_orthogonal * terms["orthogonal_text"]
            if self.phase == "finetune":
                terms["orthogonal_prompt"] = orthogonality(items.prompts, ids)
                loss = loss + self.w_orthogonal * terms["orthogonal_prompt"]
        self.log_losses(batch, loss=loss, **terms)
        return loss

    # ------------------------------------------------------------------ contracts

    def logit_inputs(self, history: Tensor, branch: str = "") -> tuple[Tensor, Tensor]:
        """States (B, H) and item vectors (N + 1, H); there is one branch only."""
        items = self.items.frozen()
        return cosine_inputs(self._states(history, items)[:, -1], items.outputs, self.tau)

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, H) state after the newest item."""
        return self._states(batch["history"], self.items.frozen())[:, -1]

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """Item vectors that scores are made of (N + 1, H) and their part from the domain's own text (N + 1, H)."""
        items = self.items.frozen()
        return items.outputs, items.text

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, F): the score and untrained text similarities, columns named by ``affinity_names``."""
        similarities = text_affinities(self.items.text, batch["history"], batch["candidates"])
        return torch.cat([self.rank(batch).unsqueeze(-1), similarities], -1)

    @property
    def semantics_of_texts(self) -> bool:
        """Whether nothing trained is in :meth:`semantics`; the attention over layers is."""
        return not self.attention

    def semantics(self) -> Tensor:
        """(N, D / text_layers) unit text vectors of this domain's items in the attention's present weights, unperturbed."""
        return self.items.semantics()

    def receive_semantics(self, vectors: Tensor) -> None:
        """Take the centroids (N, D / text_layers), rows in the order of :meth:`semantics`."""
        self.items.receive(vectors)

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing: FFMSR exchanges no weights."""
        return {}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to replace.

        Raises:
            MessageError: if there are weights in the state.
        """
        check_state({}, state, "FFMSR", MessageError)
