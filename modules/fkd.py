"""Fact-counter knowledge distillation: a semantic teacher over text, an ID student that learns from it (stage 1)."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch
from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.modules.encoders.acceptance import encoder_width
from lightning_sfubm.modules.fkd_objective import FKDObjective
from lightning_sfubm.modules.layers.cooccurrence import cooccurrence_vectors
from lightning_sfubm.modules.layers.items import id_table
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES, text_affinities
from lightning_sfubm.modules.losses.distillation import DistilWeights
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.semantic import SemanticTeacher
from lightning_sfubm.modules.settings import check_dropout
from lightning_sfubm.modules.state_check import check_state
from lightning_sfubm.ranks import needs_every_gradient

PHASES = ("teacher", "student", "joint")
COUNTERS = ("both", "non_target", "what_if", "none")


class FKDDistiller(FKDObjective):
    """Client model of SF-UBM's first stage. Implements ``FederatedModule``, ``CatalogueRanker`` and ``Stage1``.

    Phases: ``"teacher"`` trains the semantic branch alone (cosine logits), ``"student"`` the ID branch (dot logits) against
    the frozen teacher with ``CE + w_fact FACT + w_counter COUNTER + w_align ALIGN``, ``"joint"`` both at once with
    ``alpha CE(teacher)`` added, where the student follows the teacher as it trains, dropout included. Validation and ranking
    follow the branch in training; the other branch's metrics are logged as ``val/teacher_*`` or ``val/student_*``.

    Args:
        encoder: sequence encoder of the student.
        teacher_encoder: that of the teacher; ``None`` = a copy of ``encoder``.
        num_experts: whitening experts of the teacher's adaptor.
        text_dropout: dropout of text vectors while the teacher trains.
        own_share: what an item's own view has of its vector at the start, beside what the federation sent back; a learned
            gate moves it from there. Near 1 the teacher starts as it would alone.
        tau: temperature of the teacher's cosine logits.
        w_fact: weight of FACT.
        w_counter: weight of COUNTER.
        counter: which counterfactual terms: ``"non_target"``, ``"what_if"``, ``"both"`` (their sum) or ``"none"``
            [choice: ``what_if`` doubles the cost of a step, and beside ``non_target`` it was worth nothing where it was
            tried, docs/results.md].
        w_align: weight of ALIGN.
        temperature: T of the FKD terms.
        swap_probability: chance that ``what_if`` swaps an item for a neighbour in z-space.
        num_neighbours: neighbours to swap for.
        init_from_teacher: start the student's ID table from the teacher's item vectors as they are when the student's phase
            begins: trained ones after the teacher's phase, untrained ones where phase ``"joint"`` comes first [choice: on
            10,000 Beauty users a trained teacher gave validation Hit@1 .421 after 3 epochs, a random table .410 after 9].
        cooccurrence: add to that start, at the same length, which items stand near each other in this domain's training
            sequences (:func:`~lightning_sfubm.modules.layers.cooccurrence.cooccurrence_vectors`). The ID table never leaves.
        alpha: weight of the teacher's cross-entropy in the joint phase.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up, per phase.
        phase: phase to start in.
        logits_precision: number format of products against the whole catalogue.
        seed: root of the named streams.

    Raises:
        ConfigError: if a setting is unknown or out of range.
    """

    method_name = "SF-UBM"  #: what tables call the method
    side_branches = ("teacher", "student")
    affinity_names = ("score", "teacher", *TEXT_AFFINITIES)
    student_started: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        teacher_encoder: nn.Module | None = None,
        num_experts: int = 8,
        text_dropout: float = 0.0,
        own_share: float = 0.5,
        tau: float = 0.07,
        w_fact: float = 1.0,
        w_counter: float = 1.0,
        counter: Literal["both", "non_target", "what_if", "none"] = "non_target",
        w_align: float = 0.5,
        temperature: float = 1.0,
        swap_probability: float = 0.3,
        num_neighbours: int = 10,
        init_from_teacher: bool = True,
        cooccurrence: bool = False,
        alpha: float = 1.0,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        phase: Literal["teacher", "student", "joint"] = "teacher",
        logits_precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(encoder_width(encoder), lr, weight_decay, warmup_steps)
        if counter not in COUNTERS:
            raise ConfigError(f"counter={counter!r} is unknown; choose one of {COUNTERS}.")
        if min(w_fact, w_counter, w_align, alpha) < 0 or tau <= 0 or temperature <= 0:
            raise ConfigError(
                f"w_fact={w_fact}, w_counter={w_counter}, w_align={w_align}, alpha={alpha} must not be negative; "
                f"tau={tau} and temperature={temperature} must be positive."
            )
        if not 0 <= swap_probability <= 1 or num_neighbours < 1:
            raise ConfigError(
                f"swap_probability={swap_probability} must lie in [0, 1] and num_neighbours={num_neighbours} be at least 1."
            )
        if not 0 < own_share < 1:
            raise ConfigError(f"own_share={own_share} must lie between 0 and 1.")
        check_dropout(type(self).__name__, text_dropout=text_dropout)
        if teacher_encoder is not None and encoder_width(teacher_encoder) != self.hidden_dim:
            raise ConfigError(
                f"teacher_encoder has hidden_dim {encoder_width(teacher_encoder)}, the student's has {self.hidden_dim}."
            )
        self.save_plain_hyperparameters()
        self.encoder = encoder
        self._teacher_encoder = [copy.deepcopy(encoder) if teacher_encoder is None else teacher_encoder]
        self.num_experts = num_experts
        self.text_dropout = text_dropout
        self.own_share = own_share
        self.tau = tau
        self.w_align = w_align
        self.w_what_if = w_counter if counter in ("both", "what_if") else 0.0
        non_target = w_counter if counter in ("both", "non_target") else 0.0
        self.weights = DistilWeights(ce=1.0, fact=w_fact, non_target=non_target)
        self.temperature = temperature
        self.swap_probability = swap_probability
        self.num_neighbours = num_neighbours
        self.init_from_teacher = init_from_teacher
        self.cooccurrence = cooccurrence
        self.alpha = alpha
        self.logits_precision: Precision = logits_precision
        self.seed = seed
        self.align_projection = nn.Linear(self.hidden_dim, self.hidden_dim, bias=False)
        self._neighbours: Tensor | None = None
        self.phase = ""
        self.set_phase(phase)

    # ------------------------------------------------------------------ item tables

    def build(self, num_items: int, text_dim: int) -> None:
        """Create the ID table and the teacher.

        Raises:
            ConfigError: if the catalogue has no text vectors.
        """
        if not text_dim:
            raise ConfigError("FKDDistiller needs text vectors, but the datamodule has no text encoder.")
        self.ids = id_table(num_items, self.hidden_dim, self.seed)
        self.teacher = SemanticTeacher(
            self._teacher_encoder[0],
            num_items,
            text_dim,
            self.num_experts,
            self.text_dropout,
            self.tau,
            self.seed,
            self.logits_precision,
            self.own_share,
        )
        self.register_buffer("student_started", torch.zeros((), dtype=torch.bool))
        self.set_phase(self.phase)

    def load_catalogue(self, catalogue: Catalogue) -> None:
        """Take the text vectors of the catalogue."""
        assert catalogue.text_embeddings is not None
        self.teacher.text.copy_(catalogue.text_embeddings)

    def checkpoint_shapes(self) -> dict[str, Any]:
        """Shapes of the tables, the phase and whether a global view has been received."""
        received = self.teacher.global_text is not None
        return {**super().checkpoint_shapes(), "phase": self.phase, "received": received}

    def restore_shapes(self, shapes: Mapping[str, Any]) -> None:
        """Prepare for weights written in the given phase."""
        super().restore_shapes(shapes)
        if shapes["received"]:
            self.teacher.allocate_global()
        self.set_phase(shapes["phase"])

    # ------------------------------------------------------------------ phases

    @property
    def local_phases(self) -> tuple[str, ...]:
        """Teacher first, then the student against the frozen teacher."""
        return ("teacher", "student")

    @property
    def round_phase(self) -> str:
        """Only the teacher is trained during federated rounds."""
        return "teacher"

    def set_phase(self, phase: str) -> None:
        """Choose what the next epochs train.

        Args:
            phase: ``"teacher"``, ``"student"`` or ``"joint"``.

        Raises:
            ConfigError: if the phase is unknown.
        """
        if phase not in PHASES:
            raise ConfigError(f"phase={phase!r} is unknown; choose one of {PHASES}.")
        self.phase = phase
        for name, module in self.named_children():
            if name == "teacher":
                module.requires_grad_(phase != "student")
            elif name in ("encoder", "ids", "align_projection"):
                # What no loss reaches must not ask for gradients: DDP waits for all that do. The teacher's fusion is the
                # exception, unreached until a global view is received: `on_fit_start` refuses such a DDP.
                module.requires_grad_(phase != "teacher" and (name != "align_projection" or self.w_align > 0))
        self.train(self.training)

    def train(self, mode: bool = True) -> "FKDDistiller":
        """Set the mode; the branch that is not trained stays in evaluation mode."""
        super().train(mode)
        if self.is_bound and self.phase == "student":
            self.teacher.eval()
        if self.phase == "teacher":
            self.encoder.eval()
        return self

    def on_fit_start(self) -> None:
        """Start the student's table from the teacher's vectors, from co-occurrences or from both, once, where asked for.

        Raises:
            ConfigError: co-occurrences are asked for, but there are no training sequences to count them in; or the strategy
                takes no step without a gradient of every parameter, and there is no global view to fuse.
        """
        unreached = self.phase != "student" and self.teacher.global_text is None
        if unreached and needs_every_gradient(self.trainer.strategy):
            raise ConfigError(
                "the teacher's fusion gets no gradient before a federation has sent a global view, which trainer.strategy does "
                "not look for: set it to ddp_find_unused_parameters_true"
            )
        if self.phase == "teacher" or bool(self.student_started):
            return
        starts = []
        if self.init_from_teacher:
            starts.append(F.normalize(self.teacher.frozen_table(), dim=-1))
        if self.cooccurrence:
            vectors = cooccurrence_vectors(
                self.train_histories(), self.num_items, self.hidden_dim, self.seed, length=1.0
            )
            starts.append(vectors.to(self.ids.weight.device))
        if starts:
            start = torch.stack(starts).sum(0)
            # Without the teacher's vectors, items without neighbours have none: all zero rows would have the same gradients,
            # so that these items tie for ever. A short random start parts them, as in SequentialRecommender.
            with torch.no_grad():
                self.ids.weight.copy_(torch.where(start.any(1, keepdim=True), start, self.ids.weight * 0.1))
        self.student_started.fill_(True)

    def leave_out(self, *parts: str) -> None:
        """Take parts out of how the student learns, for ablations; before its phase is trained.

        Args:
            parts: ``"fact"``, ``"counter"``, ``"align"`` (terms of the loss), ``"start"`` (of the ID table, from the teacher).
        """
        if "fact" in parts:
            self.weights = replace(self.weights, fact=0.0)
        if "counter" in parts:
            self.weights, self.w_what_if = replace(self.weights, non_target=0.0), 0.0
        if "align" in parts:
            self.w_align = 0.0
        if "start" in parts:
            self.init_from_teacher = False
        self.set_phase(self.phase)  # what no term reaches any more asks for no gradient

    # ------------------------------------------------------------------ scores

    def _branch(self, branch: str) -> str:
        return branch or ("teacher" if self.phase == "teacher" else "student")

    def evaluated_branches(self) -> tuple[str, ...]:
        """The branch in training and, once there is a student, the other one."""
        other = "student" if self.phase == "teacher" else "teacher"
        return ("", other) if other == "teacher" or bool(self.student_started) else ("",)

    def logit_inputs(self, history: Tensor, branch: str = "") -> tuple[Tensor, Tensor]:
        """States (B, H) and item vectors (N + 1, H) of a branch; ``""`` is the one the phase trains."""
        if self._branch(branch) == "teacher":
            return self.teacher.frozen_scaled(self.teacher.states(history, self.teacher.frozen_table())[:, -1])
        return self._student_states(history)[:, -1], self.ids.weight

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, H) the student's state after the newest item."""
        return self._student_states(batch["history"])[:, -1]

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """ID embeddings e (N + 1, H) and semantic embeddings z (N + 1, H)."""
        return self.ids.weight, self.teacher.frozen_table()

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, F): score, teacher's score, and untrained text similarities."""
        learned = torch.stack([self.rank(batch), self.candidate_scores(batch, "teacher")], -1)
        return torch.cat([learned, text_affinities(self.teacher.text, batch["history"], batch["candidates"])], -1)

    # ------------------------------------------------------------------ federation

    semantics_of_texts = True  #: nothing in :meth:`semantics` is trained

    def semantics(self) -> Tensor:
        """(N, D) unit text vectors of this domain's items, unperturbed."""
        return self.teacher.text[1:].clone()

    def receive_semantics(self, vectors: Tensor) -> None:
        """Take the aggregated vectors (N, D), rows in the order of :meth:`semantics`."""
        self.teacher.receive(vectors)

    def shared_state(self) -> dict[str, Tensor]:
        """Detached copies of the teacher's parameters; its text vectors are buffers and not among them."""
        return {name: parameter.detach().clone() for name, parameter in self.teacher.named_parameters()}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Replace the teacher's parameters.

        Raises:
            MessageError: if keys or shapes differ.
        """
        own = dict(self.teacher.named_parameters())
        check_state(own, state, "semantic teacher", MessageError)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
