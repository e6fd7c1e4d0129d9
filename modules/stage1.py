"""What every stage-1 module shares: item tables bound to a catalogue, evaluation, checkpoints, optimiser."""

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_sfubm.contracts import Catalogue, PredictBatch, RankBatch, TrainBatch, TrainHistories
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.evaluation.metrics import candidate_ranks, catalogue_ranks, ranking_metrics, user_blocks
from lightning_sfubm.memory import hand_back, keep_freed
from lightning_sfubm.modules.encoders.acceptance import check_lengths
from lightning_sfubm.modules.encoders.arguments import constructor_arguments
from lightning_sfubm.modules.state_check import check_state

SHAPES_KEY = "stage1_shapes"
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class CatalogueModule(L.LightningModule):
    """Base of the stage-1 LightningModules.

    The item tables depend on the domain, so they are built by :meth:`bind`, from the datamodule's catalogue in
    :meth:`setup` or from the shapes stored in a checkpoint. Sub-classes implement :meth:`build`,
    :meth:`logit_inputs` and ``training_step``.

    Args:
        hidden_dim: H.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up from 0; 0 = none.
    """

    #: Names of branches evaluated beside the main one; their metrics are logged as ``val/<name>_ndcg@10``.
    side_branches: tuple[str, ...] = ()

    def __init__(self, hidden_dim: int, lr: float, weight_decay: float, warmup_steps: int) -> None:
        super().__init__()
        if not lr > 0 or not weight_decay >= 0 or warmup_steps < 0:
            raise ConfigError(
                f"lr={lr}, weight_decay={weight_decay}, warmup_steps={warmup_steps}: the learning rate must be positive "
                "and the others not negative."
            )
        self.hidden_dim = hidden_dim
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.num_items = 0
        self.text_dim = 0
        self.top_k = 10  #: items that ``predict`` recommends to a user
        self._term_sums: dict[str, Tensor] = {}
        self._term_rows = 0
        self._last_batch = False
        self.candidate_metrics = nn.ModuleDict()
        self.catalogue_metrics = nn.ModuleDict()
        for stage in ("val", "test"):
            self.candidate_metrics[stage] = ranking_metrics(f"{stage}/")
            self.catalogue_metrics[stage] = ranking_metrics(f"{stage}/full_", hits=(10, 20), ndcgs=(10, 20))
            for name in self.side_branches:
                self.candidate_metrics[f"{stage}_{name}"] = ranking_metrics(f"{stage}/{name}_", hits=(1,), ndcgs=(10,))

    # ------------------------------------------------------------------ item tables

    def build(self, num_items: int, text_dim: int) -> None:
        """Create the tables of a domain of N items with D-dimensional text vectors (D = 0: none)."""
        raise NotImplementedError

    def load_catalogue(self, catalogue: Catalogue) -> None:
        """Copy what the module keeps of the catalogue (text vectors, counts) into the tables just built."""

    @property
    def is_bound(self) -> bool:
        """Whether the item tables exist."""
        return self.num_items > 0

    def bind(self, catalogue: Catalogue) -> None:
        """Build the item tables of a domain. Binding to the same shapes again keeps what has been learned.

        Args:
            catalogue: items of the domain.

        Raises:
            ConfigError: if the module is bound to a catalogue of other shapes.
        """
        text_dim = 0 if catalogue.text_embeddings is None else catalogue.text_embeddings.shape[1]
        if not self.is_bound:
            self._build_tables(catalogue.num_items, text_dim)
        elif (self.num_items, self.text_dim) != (catalogue.num_items, text_dim):
            raise ConfigError(
                f"{type(self).__name__} is bound to {self.num_items} items with text dimension {self.text_dim}, but domain "
                f"{catalogue.name!r} has {catalogue.num_items} and {text_dim}; use a module of its own for each domain."
            )
        self.load_catalogue(catalogue)

    def _build_tables(self, num_items: int, text_dim: int) -> None:
        self.build(num_items, text_dim)
        self.num_items, self.text_dim = num_items, text_dim

    def setup(self, stage: str) -> None:
        """Bind to the datamodule's catalogue if that has not happened yet.

        Raises:
            ConfigError: there is no catalogue, it has other shapes, or histories are longer than an encoder takes.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.bind(datamodule.catalogue)
            check_lengths(self, datamodule)
        elif not self.is_bound:
            raise ConfigError(
                f"{type(self).__name__} has no items: pass a datamodule with a catalogue or call bind(catalogue) first."
            )

    def train_histories(self) -> TrainHistories:
        """Training sequences of the datamodule in the trainer.

        Raises:
            ConfigError: there is no datamodule, or its catalogue has none (that of several domains together).
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        histories: TrainHistories | None = None if datamodule is None else datamodule.catalogue.histories
        if histories is None:
            raise ConfigError("a start from co-occurrences needs a datamodule whose catalogue has training sequences")
        return histories

    # ------------------------------------------------------------------ scores

    def logit_inputs(self, history: Tensor, branch: str = "") -> tuple[Tensor, Tensor]:
        """What a branch's scores are dot products of.

        Args:
            history: (B, L) item ids, left-padded.
            branch: ``""`` for the main branch, or one of ``side_branches``.

        Returns:
            States after the newest item (B, H) and item vectors (N + 1, H), scaled as the branch's logits ask for.
        """
        raise NotImplementedError

    def evaluated_branches(self) -> tuple[str, ...]:
        """Branches whose metrics are logged now; ``""`` is the main one."""
        return ("",)

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1) of the main branch; column 0 (padding) is meaningless."""
        states, items = self.logit_inputs(batch["history"])
        return states @ items.T

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C) of the candidates by the main branch."""
        return self.candidate_scores(batch)

    def candidate_scores(self, batch: RankBatch, branch: str = "") -> Tensor:
        """Scores (B, C) of the candidates by one branch."""
        states, items = self.logit_inputs(batch["history"], branch)
        return (F.embedding(batch["candidates"], items) @ states.unsqueeze(-1)).squeeze(-1)

    # ------------------------------------------------------------------ evaluation

    def validation_metrics(self) -> list[str]:
        """Names under which validation logs, sorted; those of side branches too, which not every phase has."""
        collections = [*self.candidate_metrics.items(), *self.catalogue_metrics.items()]
        return sorted(
            str(key)
            for stage, metrics in collections
            if stage.split("_")[0] == "val"
            for key in cast(MetricCollection, metrics)
        )

    def _evaluate(self, stage: str, batch: RankBatch) -> None:
        size = len(batch["user"])
        for branch in self.evaluated_branches():
            among, full_ranks = self._ranks(batch, branch)
            metrics = cast(MetricCollection, self.candidate_metrics[f"{stage}_{branch}" if branch else stage])
            metrics.update(among)
            self.log_dict(cast(Any, metrics), on_step=False, on_epoch=True, batch_size=size)
            if not branch:
                full = cast(MetricCollection, self.catalogue_metrics[stage])
                full.update(full_ranks)
                self.log_dict(cast(Any, full), on_step=False, on_epoch=True, batch_size=size)

    @torch.no_grad()
    def _ranks(self, batch: RankBatch, branch: str) -> tuple[Tensor, Tensor]:
        """Ranks of the targets among the candidates (B,), and in the catalogue (B,) by the main branch."""
        states, items = self.logit_inputs(batch["history"], branch)
        among, full, seen = [], [], batch.get("seen")
        with torch.autocast(states.device.type, enabled=False):
            states, items = states.float(), items.float()
            block: Tensor | None = None
            for rows in user_blocks(len(states), len(items), states.device):
                if block is None:
                    block = states.new_empty(rows.stop - rows.start, len(items))
                scores = torch.mm(states[rows], items.T, out=block[: rows.stop - rows.start])
                among.append(candidate_ranks(scores.gather(1, batch["candidates"][rows]), batch["target_index"][rows]))
                if not branch:
                    known = seen if seen is None else seen[rows]
                    full.append(catalogue_ranks(scores, batch["target"][rows], known))
        return torch.cat(among), torch.cat(full) if full else torch.empty(0)

    def validation_step(self, batch: RankBatch, batch_idx: int) -> None:
        """Log ``val/hit@1``, ``val/ndcg@10``, ``val/mrr`` over candidates and ``val/full_*`` over the catalogue."""
        self._evaluate("val", batch)

    def test_step(self, batch: RankBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> dict[str, Tensor]:
        """The :attr:`top_k` best items of the catalogue that the user has not had yet, after all that the user had.

        Returns:
            ``user`` (B,), ``items`` (B, k) and their ``scores`` (B, k), best first; k is at most N. Where a user has had
            nearly everything, places that are left over hold item 0 with score -inf.
        """
        scores = self.score_all(cast(RankBatch, batch)).float()  # no score depends on what there is to be predicted
        scores[:, 0] = -torch.inf
        scores.scatter_(1, batch.get("seen", batch["history"]), -torch.inf)
        best = scores.topk(min(self.top_k, scores.shape[1] - 1), dim=1)
        items = best.indices.masked_fill(best.values == -torch.inf, 0)
        return {"user": batch["user"], "items": items, "scores": best.values}

    def on_train_batch_start(self, batch: TrainBatch, batch_idx: int) -> None:
        """Begin new sums of training terms with the first batch of an epoch.

        Raises:
            ConfigError: the batch is none of sequences.
        """
        if "targets" not in batch:
            raise ConfigError(
                f"{type(self).__name__} is trained on sequences, which these data do not give: use lightning_sfubm.datamodules."
                "domain_datamodule.DomainDataModule"
            )
        if batch_idx == 0:
            self._term_sums, self._term_rows = {}, 0
        self._last_batch = self.trainer.is_last_batch or batch_idx + 1 >= self.trainer.num_training_batches

    def on_train_start(self) -> None:
        """Keep freed memory from step to step (CPU)."""
        if self.device.type == "cpu":
            keep_freed()

    def on_train_epoch_end(self) -> None:
        """Hand back what the steps of an epoch have left with the allocator (CPU)."""
        if self.device.type == "cpu":
            hand_back()

    def log_losses(self, batch: TrainBatch, **terms: Tensor) -> None:
        """Log training terms under ``train/``, averaged over the epoch's rows.

        They are summed here and given to Lightning once, with the epoch's last batch: every call of ``log`` costs one to two
        milliseconds. An epoch that is broken off before its last batch logs none.
        """
        rows = len(batch["user"])
        self._term_rows += rows
        for name, value in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach() * rows
        if self._last_batch:
            means = {f"train/{name}": value / self._term_rows for name, value in self._term_sums.items()}
            self.log_dict(means, on_step=False, on_epoch=True, batch_size=self._term_rows, sync_dist=True)

    # ------------------------------------------------------------------ optimiser

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """What the optimiser moves."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW (fused), with linear warm-up per step where asked for."""
        return self.with_warmup(torch.optim.AdamW)

    def with_warmup(self, kind: type[torch.optim.AdamW]) -> OptimizerLRScheduler:
        """An optimiser of this kind with the module's settings."""
        optimizer = kind(list(self.trained_parameters()), lr=self.lr, weight_decay=self.weight_decay, fused=True)
        if not self.warmup_steps:
            return optimizer
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return cast(
            OptimizerLRScheduler,
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}},
        )

    # ------------------------------------------------------------------ checkpoints

    def save_plain_hyperparameters(self) -> None:
        """Save the arguments of the calling ``__init__``, modules among them as ``class_path`` and ``init_args``.

        The command line stores modules so already; this gives a module built in Python the same checkpoint, which loads
        with ``weights_only=True`` and rebuilds its parts. Their arguments are read from attributes of the same name.

        Raises:
            ConfigError: a module lacks such an attribute.
        """
        frame = inspect.currentframe()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
            self.save_hyperparameters(frame=frame.f_back if frame else None)
        modules = {name: value for name, value in self.hparams.items() if isinstance(value, nn.Module)}
        for name, value in modules.items():
            cls = type(value)
            init_args = constructor_arguments(value)
            self.hparams[name] = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}
        if modules:
            self.hparams["_instantiator"] = INSTANTIATOR
            self._hparams_initial = copy.deepcopy(self.hparams)

    def checkpoint_shapes(self) -> dict[str, Any]:
        """What :meth:`build` needs to rebuild the tables, and whatever else has to exist before weights are loaded."""
        return {"module": type(self).__name__, "num_items": self.num_items, "text_dim": self.text_dim}

    def restore_shapes(self, shapes: Mapping[str, Any]) -> None:
        """Prepare for the weights of a checkpoint whose :meth:`checkpoint_shapes` are given."""
        if not self.is_bound:
            self._build_tables(int(shapes["num_items"]), int(shapes["text_dim"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the shapes of the item tables."""
        checkpoint[SHAPES_KEY] = self.checkpoint_shapes()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the item tables and refuse weights of another model.

        Raises:
            CheckpointError: if the checkpoint is of another module, catalogue or encoder.
        """
        shapes, name = checkpoint.get(SHAPES_KEY), type(self).__name__
        if shapes is None or shapes["module"] != name:
            other = "no stage-1 module" if shapes is None else shapes["module"]
            raise CheckpointError(
                f"The checkpoint is of {other}, not of {name}; load it with the module that wrote it."
            )
        for key in ("num_items", "text_dim"):
            if self.is_bound and shapes[key] != getattr(self, key):
                raise CheckpointError(
                    f"The checkpoint has {key}={shapes[key]}, this {name} has {getattr(self, key)}; "
                    "it belongs to another domain or text encoder."
                )
        self.restore_shapes(shapes)
        check_state(self.state_dict(), checkpoint["state_dict"], name)
