"""What a step of fact-counter knowledge distillation minimises: the teacher's loss, the student's against it, or both."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_sfubm.contracts import TrainBatch
from lightning_sfubm.modules.losses.cross_entropy import full_cross_entropy
from lightning_sfubm.modules.losses.distillation import DistilWeights, distil
from lightning_sfubm.modules.losses.fkd import align, prefixes, swap_items
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.losses.ranks import mean_over_ranks, union_over_ranks
from lightning_sfubm.modules.semantic import SemanticTeacher
from lightning_sfubm.modules.stage1 import CatalogueModule
from lightning_sfubm.seeds import own_step_of, torch_generator


class FKDObjective(CatalogueModule):
    """Training of a distiller's two branches. What its attributes mean stands in ``FKDDistiller``, which sets them."""

    phase: str
    encoder: nn.Module
    ids: nn.Embedding
    teacher: SemanticTeacher
    align_projection: nn.Linear
    weights: DistilWeights
    w_what_if: float
    w_align: float
    alpha: float
    tau: float
    temperature: float
    swap_probability: float
    num_neighbours: int
    logits_precision: Precision
    seed: int
    _neighbours: Tensor | None

    def on_train_epoch_start(self) -> None:
        """Refresh the neighbours of ``what_if`` (the teacher moves in the joint phase only)."""
        if self.w_what_if and self.phase != "teacher":
            self._neighbours = self.teacher.neighbours(self.num_neighbours)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Loss of the current phase, every term logged as ``train/<name>``."""
        terms: dict[str, Tensor] = {}
        table = self.teacher.table() if self.phase != "student" else self.teacher.frozen_table()
        loss = table.new_zeros(())
        predicting = batch["targets"] != 0
        with torch.set_grad_enabled(self.phase != "student"):
            states = self.teacher.states(batch["history"], table)[predicting]
            frozen = self.phase == "student"
            states, scaled = self.teacher.frozen_scaled(states) if frozen else self.teacher.scaled(states, table)
        if self.phase != "student":
            terms["teacher_ce"] = full_cross_entropy(
                states, scaled, batch["targets"][predicting], self.logits_precision
            )
            teacher_ce = mean_over_ranks(terms["teacher_ce"], len(states))
            loss = teacher_ce * (self.alpha if self.phase == "joint" else 1.0)
        if self.phase != "teacher":
            loss = loss + self._student_loss(batch, states.detach(), table.detach(), scaled.detach(), terms)
        self.log_losses(batch, loss=loss, **terms)
        return loss

    def _student_loss(
        self, batch: TrainBatch, teacher_states: Tensor, z: Tensor, teacher_table: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """CE + FKD of the ID branch; adds its terms to ``terms``."""
        history, predicting = batch["history"], batch["targets"] != 0
        targets = batch["targets"][predicting]
        states = self._student_states(history)[predicting]
        if self.weights.fact or self.weights.non_target:
            loss, values = distil(
                states,
                self.ids.weight,
                teacher_states,
                teacher_table,
                targets,
                prefixes(history, predicting),
                self.weights,
                self.temperature,
                self.logits_precision,
            )
            terms["ce"], terms["fact"], terms["counter_non_target"] = values["ce"], values["fact"], values["non_target"]
        else:
            loss = terms["ce"] = full_cross_entropy(states, self.ids.weight, targets, self.logits_precision)
        if self.w_what_if:
            terms["counter_what_if"], weighted = self._what_if(history, predicting, targets, z, teacher_table)
            loss = loss + weighted
        loss = mean_over_ranks(loss, len(targets))
        if self.w_align:  # over the items of all ranks: each computes the same value
            items = union_over_ranks(torch.cat([history.flatten(), targets]), self.num_items + 1)
            items = items[items != 0]
            terms["align"] = align(self.align_projection(self.ids(items)), z[items], self.tau)
            loss = loss + self.w_align * terms["align"]
        return loss

    def _what_if(
        self, history: Tensor, predicting: Tensor, targets: Tensor, z: Tensor, teacher_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Value and weighted loss of COUNTER ``what_if`` on sequences with swapped items."""
        if self._neighbours is None:
            self._neighbours = self.teacher.neighbours(self.num_neighbours)
        generator = torch_generator(self.seed, "what_if", *own_step_of(self))
        swapped = swap_items(history, self._neighbours, self.swap_probability, generator)
        with torch.no_grad():
            teacher_states, _ = self.teacher.scaled(self.teacher.states(swapped, z)[predicting], z[:1])
        loss, values = distil(
            self._student_states(swapped)[predicting],
            self.ids.weight,
            teacher_states,
            teacher_table,
            targets,
            prefixes(swapped, predicting),
            replace(self.weights, ce=0.0, fact=0.0, non_target=0.0, full_kl=self.w_what_if),
            self.temperature,
            self.logits_precision,
        )
        return values["full_kl"], loss

    def _student_states(self, history: Tensor) -> Tensor:
        return self.encoder(self.ids(history), history != 0)
