"""Next-item recommendation in one domain: an encoder over item vectors, trained alone."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch, TrainBatch
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.acceptance import encoder_width
from lightning_sfubm.modules.layers.cooccurrence import cooccurrence_vectors
from lightning_sfubm.modules.layers.items import ItemTable
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES, text_affinities
from lightning_sfubm.modules.losses.cross_entropy import cosine_inputs, full_cross_entropy
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.losses.ranks import mean_over_ranks
from lightning_sfubm.modules.losses.sampled import (
    binary_cross_entropy,
    bpr_max,
    draw,
    other_items,
    proposal,
    sampled_cross_entropy,
)
from lightning_sfubm.modules.losses.unit import unit
from lightning_sfubm.modules.row_adam import RowAdamW
from lightning_sfubm.modules.settings import check_dropout
from lightning_sfubm.modules.stage1 import CatalogueModule
from lightning_sfubm.seeds import own_step_of, step_of, torch_generator

FEATURES = ("id", "text", "id+text")
LOSSES = ("full", "sampled", "bpr_max", "bce")


class SequentialRecommender(CatalogueModule):
    """SASRec, GRU4Rec or any plug-in encoder over ids, text or both, as a LightningModule.

    Implements the contracts ``CatalogueRanker`` and ``Stage1``.

    Args:
        encoder: a module that keeps :class:`lightning_sfubm.contracts.Encoder`.
        features: item vectors from ``"id"``, ``"text"`` (an adaptor over frozen text vectors) or ``"id+text"`` (the sum).
        logits: ``"dot"`` or ``"cosine"`` between state and item vector.
        tau: temperature of cosine logits.
        loss: ``"full"`` cross-entropy over all items, ``"sampled"`` softmax or ``"bpr_max"`` (GRU4Rec's two losses on shared
            negatives), or ``"bce"`` with one negative (the original SASRec's).
        num_negatives: negatives shared by a batch, of ``"sampled"`` and ``"bpr_max"``.
        negative_power: 0 draws them uniformly, 1 by popularity.
        logq: strength in [0, 1] of the log-Q correction of ``"sampled"``; 0 = none.
        bpreg: weight of BPR-max's score regularisation.
        elu_param: alpha of the ELU on BPR-max's scores; 0 = linear.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up.
        num_experts: whitening experts of the text adaptor.
        text_dropout: dropout of text vectors while training.
        item_updates: ``"all"`` item vectors by AdamW in every step, or only the ``"rows"`` a step has touched
            (:class:`~lightning_sfubm.modules.row_adam.RowAdamW`), for ids of large catalogues under a loss on negatives.
        logits_precision: number format of products against the whole catalogue.
        item_init: start the learned item vectors from ``"random"`` ones, or from the ``"cooccurrence"`` of items in training
            sequences (:func:`~lightning_sfubm.modules.layers.cooccurrence.cooccurrence_vectors`).
        input_scale: item vectors are multiplied by it on their way into the encoder, not on the way out, and learned ones start
            shorter by as much. ``sqrt(H)`` is what the original SASRec does.
        seed: root of the named streams (initial table, negatives, gate noise).

    Raises:
        ConfigError: if a setting is unknown or out of range.

    Example:
        >>> from lightning_sfubm.modules.encoders.sasrec import SASRec
        >>> model = SequentialRecommender(SASRec(hidden_dim=64), logits="dot")
    """

    negative_proposal: Tensor
    items_started: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        features: Literal["id", "text", "id+text"] = "id",
        logits: Literal["dot", "cosine"] = "dot",
        tau: float = 0.07,
        loss: Literal["full", "sampled", "bpr_max", "bce"] = "full",
        num_negatives: int = 512,
        negative_power: float = 0.5,
        logq: float = 1.0,
        bpreg: float = 1.0,
        elu_param: float = 0.5,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        num_experts: int = 1,
        text_dropout: float = 0.0,
        item_updates: Literal["all", "rows"] = "all",
        logits_precision: Precision = "auto",
        item_init: Literal["random", "cooccurrence"] = "random",
        input_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder_width(encoder), lr, weight_decay, warmup_steps)
        if features not in FEATURES or logits not in ("dot", "cosine") or loss not in LOSSES:
            raise ConfigError(
                f"features={features!r}, logits={logits!r}, loss={loss!r}: choose features from {FEATURES}, "
                f"logits from ('dot', 'cosine'), loss from {LOSSES}."
            )
        if tau <= 0 or num_negatives < 1:
            raise ConfigError(f"tau={tau} must be positive and num_negatives={num_negatives} at least 1.")
        if not 0 <= logq <= 1 or bpreg < 0 or elu_param < 0:
            raise ConfigError(
                f"logq={logq} must lie in [0, 1], bpreg={bpreg} and elu_param={elu_param} must not be negative."
            )
        if item_updates not in ("all", "rows") or (item_updates == "rows" and (features != "id" or loss == "full")):
            raise ConfigError(
                f"item_updates={item_updates!r} with features={features!r} and loss={loss!r}: choose 'all', or 'rows' with "
                "features 'id' and a loss on negatives, since text and the full loss touch every item in every step."
            )
        if item_init not in ("random", "cooccurrence") or (item_init == "cooccurrence" and "id" not in features):
            raise ConfigError(
                f"item_init={item_init!r} with features={features!r}: choose 'random', or 'cooccurrence' with features "
                "'id' or 'id+text', which have learned item vectors."
            )
        if not 0 < input_scale < math.inf or (input_scale != 1 and "text" in features):
            raise ConfigError(
                f"input_scale={input_scale} with features={features!r}: it must be finite and above 0, and 1 with text."
            )
        check_dropout(type(self).__name__, text_dropout=text_dropout)
        self.save_plain_hyperparameters()
        self.encoder = encoder
        self.features = features
        self.logits = logits
        self.tau = tau
        self.loss = loss
        self.num_negatives = num_negatives
        self.negative_power = negative_power
        self.logq = logq
        self.bpreg = bpreg
        self.elu_param = elu_param
        self.num_experts = num_experts
        self.text_dropout = text_dropout
        self.item_updates = item_updates
        self.item_init = item_init
        self.input_scale = input_scale
        self._cumulative: Tensor | None = None
        self.logits_precision: Precision = logits_precision
        self.seed = seed

    @property
    def affinity_names(self) -> tuple[str, ...]:
        """Columns of :meth:`affinities`: the score, and text similarities where text is used."""
        return ("score", *TEXT_AFFINITIES) if "text" in self.features else ("score",)

    def build(self, num_items: int, text_dim: int) -> None:
        """Create the item table.

        Raises:
            ConfigError: if text is to be used and the catalogue has none.
        """
        if "text" in self.features and not text_dim:
            raise ConfigError(f"features={self.features!r} needs text vectors, but the datamodule has no text encoder.")
        self.items = ItemTable(
            num_items,
            self.hidden_dim,
            self.features,
            text_dim,
            self.num_experts,
            self.text_dropout,
            self.seed,
            self.logits_precision,
        )
        if self.input_scale != 1 and self.items.ids is not None:
            self.items.ids.weight.data.div_(self.input_scale)
        self.register_buffer("negative_proposal", proposal(torch.zeros(num_items + 1), 0.0))
        if self.item_init == "cooccurrence":
            self.register_buffer("items_started", torch.zeros((), dtype=torch.bool))

    def load_catalogue(self, catalogue: Catalogue) -> None:
        """Take text vectors and the proposal of negatives from the catalogue."""
        self.negative_proposal.copy_(proposal(catalogue.train_counts, self.negative_power))
        self._cumulative = None
        if "text" in self.features and catalogue.text_embeddings is not None:
            self.items.text.copy_(catalogue.text_embeddings)

    # ------------------------------------------------------------------ training

    def encode(self, history: Tensor, table: Tensor) -> Tensor:
        """States (B, L, H) of histories (B, L), items as rows of the table (N + 1, H)."""
        vectors = F.embedding(history, table, padding_idx=0)
        return self.encoder(vectors if self.input_scale == 1 else vectors * self.input_scale, history != 0)

    def _scaled(self, states: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return cosine_inputs(states, table, self.tau) if self.logits == "cosine" else (states, table)

    def _negatives(self, targets: Tensor) -> Tensor:
        """Ids of the step's negatives: none, one for each target (V,), or those that all positions share (M,)."""
        if self.loss == "full":
            return targets[:0]
        if self.loss == "bce":
            return other_items(targets, self.num_items, torch_generator(self.seed, "negatives", *own_step_of(self)))
        generator = torch_generator(self.seed, "negatives", *step_of(self))
        if self._cumulative is None:
            self._cumulative = self.negative_proposal.to("cpu", torch.float64).cumsum(0)
        return draw(self._cumulative, self.num_negatives, generator).to(targets.device)

    def _loss(self, states: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """The chosen loss of states (V, H) against items (U, H), with targets and negatives as rows of these."""
        if self.loss == "full":
            return full_cross_entropy(states, items, targets, self.logits_precision)
        if self.loss == "bce":
            return binary_cross_entropy(states, items, targets, negatives)
        if self.loss == "bpr_max":
            return bpr_max(states, items, targets, negatives, self.bpreg, self.elu_param)
        return sampled_cross_entropy(states, items, targets, negatives, log_q, self.logq)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Loss of the next item at every position that has one."""
        predicting = batch["targets"] != 0
        history, targets = batch["history"], batch["targets"][predicting]
        negatives = self._negatives(targets)
        log_q = self.negative_proposal[negatives].log()
        if self.item_updates == "rows":
            table, (history, targets, negatives) = self.items.excerpt(history, targets, negatives)
        else:
            table = self.items()
        states, items = self._scaled(self.encode(history, table)[predicting], table)
        loss = self._loss(states, items, targets, negatives, log_q)
        self.log_losses(batch, loss=loss)
        return mean_over_ranks(loss, len(targets))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As :meth:`CatalogueModule.configure_optimizers`."""
        return self.with_warmup(RowAdamW) if self.item_updates == "rows" else super().configure_optimizers()

    def on_fit_start(self) -> None:
        """Start the item vectors, once, where asked for; refuse what sparse gradients do not have.

        Raises:
            ConfigError: gradients are to be clipped, scaled, or exchanged between processes; or there are no sequences to
                start from.
        """
        if self.item_init == "cooccurrence" and not bool(self.items_started):
            self._start_items()
        if self.item_updates != "rows":
            return
        if self.trainer.gradient_clip_val:
            raise ConfigError(
                "item_updates 'rows' has sparse gradients, which are not clipped: unset gradient_clip_val"
            )
        if self.trainer.precision == "16-mixed":
            raise ConfigError(
                "item_updates 'rows' has sparse gradients, which are not scaled: set trainer.precision to bf16-mixed or 32-true"
            )
        if self.trainer.world_size > 1:
            raise ConfigError("item_updates 'rows' has sparse gradients, which DDP does not exchange: set devices to 1")

    def _start_items(self) -> None:
        assert self.items.ids is not None
        vectors = cooccurrence_vectors(self.train_histories(), self.num_items, self.hidden_dim, self.seed)
        vectors /= self.input_scale
        # Items without neighbours keep a random start: under cosine logits a zero row has no direction to be compared by, and
        # under dot logits all zero rows would have the same gradients, so that these items tie for ever. There a short one
        # parts them.
        random = self.items.ids.weight * (1.0 if self.logits == "cosine" and "text" not in self.features else 0.1)
        started = vectors.any(1, keepdim=True).to(self.device)
        with torch.no_grad():
            self.items.ids.weight.copy_(torch.where(started, vectors.to(self.device), random))
            self.items.ids.weight[0].zero_()
        self.items_started.fill_(True)

    # ------------------------------------------------------------------ contracts

    def logit_inputs(self, history: Tensor, branch: str = "") -> tuple[Tensor, Tensor]:
        """States (B, H) and item vectors (N + 1, H); there is one branch only."""
        table = self.items.frozen()
        states = self.encode(history, table)[:, -1]
        return (unit(states) / self.tau, self.items.frozen_unit(table)) if self.logits == "cosine" else (states, table)

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, H) state after the newest item."""
        return self.encode(batch["history"], self.items.frozen())[:, -1]

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """Item vectors (N + 1, H) and their part computed from text (N + 1, H), zero where text is not used."""
        table, semantic = self.items.frozen(), self.items.semantic()
        return table, torch.zeros_like(table) if semantic is None else semantic

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, F) raw features, columns named by :attr:`affinity_names`."""
        score = self.rank(batch).unsqueeze(-1)
        if "text" not in self.features:
            return score
        return torch.cat([score, text_affinities(self.items.text, batch["history"], batch["candidates"])], -1)
