"""What a method of the table is, and one domain within an experiment as its methods see it."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_sfubm.contracts import Ranker, Stage1
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule, Split
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.evaluate import evaluate_ranker
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.layers.count_affinity import WithCounts
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.training import Stopwatch, fit_to_early_stopping

if TYPE_CHECKING:
    from lightning_sfubm.experiment import Experiment

T = TypeVar("T")

#: most users of a split that choose the weights of a late fusion; more make them no better, and take memory
FUSION_USERS = 10_000

#: stage-1 rows and the twins whose students rank in them; 0 is the federated client
TWINS = {
    "stage1_local": (1,),
    "stage1": (0,),
    "stage1_with_teacher": (0,),
    "stage1_beside_own": (0, 1),
    "stage1_local_twice": (1, 2),
}


@dataclass(frozen=True)
class Method:
    """A row: its label, the heading it stands under, and how its ranker is made for one domain.

    Attributes:
        label: what tables call it.
        group: heading.
        build: makes the ranker.
        needs_llm: whether ``experiment.llm`` has to be configured for it.
        needs_stage1: whether the federated rounds have to be run for it.
        configurable: whether it takes a module from ``experiment.baselines``.
        promises: settings that such a module must have, for the label states them.
        encoder: class whose forward pass its encoder must have, for the label states it; ``None`` = any.
        trainings: its trainings to early stopping, by the names that ``experiment.patience`` gives.
        branch: a side branch that it needs of the stage-1 module.
        fitted: whether weights of it are chosen, or an LLM is tuned, on positions held out from stage 1.
    """

    label: str
    group: str
    build: Callable[["DomainRun"], Ranker]
    needs_llm: bool = False
    needs_stage1: bool = False
    configurable: bool = False
    promises: Mapping[str, str] = field(default_factory=dict)
    encoder: type[nn.Module] | None = None
    trainings: tuple[str, ...] = ()
    branch: str = ""
    fitted: bool = False


class DomainRun:
    """One domain within an experiment: data, trained stage 1, and what the methods share.

    Args:
        experiment: its settings.
        trainer: of the run.
        template: the stage-1 module as configured, untrained.
        name: of the domain.
        client: of the finished federated run.
        watch: timings.
        run_dir: folder of the run.
        shared: what rows of all domains have in common, such as a model pre-trained on their union.

    Attributes:
        to_come: rows that this process makes after the one at work; rows kept from before are not among them.
        kept: rows that an earlier process made of these settings and data, whether they are asked for now or not.
        tuned: heads that an earlier process tuned for one of them, by name.
    """

    def __init__(
        self,
        experiment: "Experiment",
        trainer: FederatedTrainer,
        template: LightningModule,
        name: str,
        client: Client,
        watch: Stopwatch,
        run_dir: Path,
        shared: dict[str, Any],
    ) -> None:
        self.experiment, self.trainer, self.template = experiment, trainer, template
        self.name, self.client, self.watch, self.run_dir = name, client, watch, run_dir
        self.shared, self.common_cpu_s = shared, 0.0
        self.to_come: set[str] = set()
        self.kept: set[str] = set()
        self.tuned: set[str] = set()

    @property
    def data(self) -> DomainDataModule:
        """The domain's data, with positions held out for stage 2."""
        return self.client.datamodule  # type: ignore[return-value]

    @property
    def stage1(self) -> Any:
        """The trained stage-1 module."""
        return self.client.module

    def own_encoder(self, row: str) -> nn.Module:
        """A copy of ``model.encoder`` for a row, to be trained whatever phase the stage-1 module stands in.

        A distiller whose teacher comes first holds its own encoder still: without gradients, and without dropout.

        Raises:
            ConfigError: the model has none.
        """
        encoder = getattr(self.template, "encoder", None)
        if encoder is None:
            raise ConfigError(
                f"row '{row}' takes its encoder from model.encoder, which this model does not have; "
                f"configure it as experiment.baselines.{row}"
            )
        own: nn.Module = copy.deepcopy(encoder)
        return own.requires_grad_(True).train()

    @cached_property
    def full_data(self) -> DomainDataModule:
        """The same data without a hold-out, for methods that have no second stage."""
        data = self.data.without_holdout()
        data.setup("fit")
        return data

    @cached_property
    def ranking_data(self) -> RankingDataModule:
        """Samples of the LLM stage, and the test users on whom all rows are compared."""
        return self._ranking_data(self.experiment.train_candidates)

    @cached_property
    def list_data(self) -> RankingDataModule:
        """The same samples with all candidates, for prompts that list them."""
        return self._ranking_data(self.data.num_candidates)

    def _ranking_data(self, train_candidates: int) -> RankingDataModule:
        experiment = self.experiment
        return RankingDataModule(
            self.data,
            batch_size=experiment.llm_batch_size,
            eval_batch_size=experiment.llm_eval_batch_size,
            train_candidates=train_candidates,
            max_train_users=experiment.max_train_users,
            max_val_users=experiment.calibration_users or None,
            max_test_users=experiment.max_test_users,
            seed=self.data.seed,
        )

    @cached_property
    def fusion(self) -> LateFusion:
        """Late fusion fitted on held-out samples, more than the LLM may get; the LLM head starts from its weights."""
        return self.fused(self.stage1)

    @cached_property
    def _stage1_with_counts(self) -> WithCounts:
        return WithCounts(self.stage1, self.data.catalogue)

    @cached_property
    def count_fusion(self) -> LateFusion:
        """The same with count affinities of the positions that trained stage 1; held-out ones are not counted.

        Validation positions choose its weights too: there are more of them, and more weights.
        """
        return self.fused(self._stage1_with_counts, ("train2", "val"))

    @cached_property
    def product_fusion(self) -> LateFusion:
        """The same with the products of features."""
        return self.fused(self._stage1_with_counts, ("train2", "val"), products=True)

    def fused(self, stage1: Stage1, splits: tuple[Split, ...] = ("train2",), products: bool = False) -> LateFusion:
        """A fusion of a module's affinities, weighed on these splits; ``train2`` has to be one that it was not trained on."""
        fusion = LateFusion(stage1, products=products)
        samples = [self.data.rank_dataloader(split, 256, max_users=FUSION_USERS) for split in splits]
        fusion.fit(chain.from_iterable(samples) if len(samples[0]) else [])  # never on validation alone
        return fusion

    def twin(self, number: int) -> Client:
        """The client itself (0), or as trained alone (1, 2 ...): see :meth:`FederatedTrainer.local_twin`."""
        return self.trainer.local_twin(self.template, self.name, number) if number else self.client

    def new_client(self, label: str) -> Client:
        """An untrained client of this domain beside the federated one, with the same first weights."""
        make_trainer = partial(self.trainer.make_trainer, client=f"{self.name}, {label}")
        client = Client(self.name, copy.deepcopy(self.template), self.data, make_trainer, self.trainer.seed)
        client.prepare()
        return client

    def train_phases(self, client: Client, phases: Iterable[str], key: str) -> None:
        """Train phases of a client as the federated one is trained locally, and leave its module ready to rank."""
        federation = self.trainer.federation
        assert federation is not None
        for phase in phases:
            client.train_phase(
                phase,
                self.folder(key),
                lambda epoch, metrics: None,
                max_epochs=federation.local_max_epochs,
                min_epochs=federation.local_min_epochs,
                patience=federation.patience,
                monitor=federation.monitor,
            )
        client.finish()

    def once(self, key: str, label: str, build: Callable[[], T]) -> T:
        """What several rows or domains build on, made at first use.

        Its time is kept under its own name, so that it is not a cost of the row that happens to ask first.

        Args:
            key: what it is, settings included.
            label: its name among the timings.
            build: makes it.
        """
        if key not in self.shared:
            before, began = self.common_cpu_s, time.process_time()
            with self.watch(f"train {label}"):
                self.shared[key] = build()
            # By this domain, another's rows have not paid for it; and once, whatever was made within.
            self.common_cpu_s = before + time.process_time() - began
        made: T = self.shared[key]
        return made

    def spent_on(self, key: str) -> float:
        """CPU seconds of a row's training so far, in all domains, without what this one made by :meth:`once`.

        Differences are what counts: what was made in common before a row is taken off before and after it.
        """
        trained = self.watch.timings.get(f"train {key}", {"cpu_s": 0.0})["cpu_s"]
        return trained - self.common_cpu_s

    def train_cpu_s(self, key: str, cpu_s: float) -> float | None:
        """CPU seconds a row's training took: for a stage-1 row those of its clients, else what was measured."""
        if key not in TWINS:
            return cpu_s
        parts = [self.twin(number).train_cpu_s for number in TWINS[key]]
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def data_hashes(self) -> tuple[str, str]:
        """Fingerprint of the data and hash of the test candidates: rows with others are not of this table."""
        return self.data.domain.fingerprint, self.data.candidate_hash["test"]

    @property
    def has_larger_test(self) -> bool:
        """Whether there are test users beyond those all rows are compared on."""
        limit = self.experiment.max_test_users
        return limit is not None and limit < len(self.data.splits.eval_users)

    def evaluate(
        self, ranker: Ranker, key: str, method: Method, order: int, extra: dict[str, Any], all_users: bool = False
    ) -> PerUserResults:
        """Rank the stored test candidates."""
        batches = self.data.rank_dataloader(
            "test",
            self.experiment.llm_eval_batch_size if method.needs_llm else self.data.eval_batch_size,
            max_users=None if all_users else self.experiment.max_test_users,
            with_seen=True,
        )
        return evaluate_ranker(
            ranker,
            batches,
            catalogue=self.data.catalogue,
            method=key,
            label=self.label(method),
            group=self._named(method.group),
            order=order,
            domain=self.name,
            split="test",
            seed=self.trainer.seed,
            candidate_hash=self.data_hashes[1],
            data_fingerprint=self.data_hashes[0],
            extra=extra,
            trainable_params=_trained(ranker),
            device=self.trainer.strategy.root_device,
        )

    def label(self, method: Method) -> str:
        """What the table calls a row."""
        return self._named(method.label)

    def _named(self, text: str) -> str:
        """The text with the names of the encoder and of the federated method filled in."""
        alone = self.experiment.baselines.get("encoder", self.template)  # what row 'encoder' trains
        encoder = type(getattr(alone, "encoder", alone)).__name__
        return text.format(encoder=encoder, model=getattr(self.template, "method_name", type(self.template).__name__))

    def fit(self, module: LightningModule, key: str, datamodule: LightningDataModule | None = None) -> None:
        """Train a single-domain module as stage 1 is trained: to early stopping on validation, the best epoch kept.

        Args:
            module: trained in place; bound to the domain's catalogue where it has one.
            key: of the row; names its folder and its progress bar.
            datamodule: the domain's data without a hold-out where ``None``.
        """
        federation = self.trainer.federation
        assert federation is not None
        fit_to_early_stopping(
            self.trainer.make_trainer,
            module,
            self.full_data if datamodule is None else datamodule,
            label=f"{key}, {self.name}",
            folder=self.folder(key),
            max_epochs=federation.local_max_epochs,
            min_epochs=federation.local_min_epochs,
            patience=self.experiment.patience.get(key, federation.patience),
            monitor=federation.monitor,
        )

    def row_path(self, key: str, all_users: bool = False) -> Path:
        """Where the results of a row are kept: on the users whom all rows are compared on, or on all."""
        return self.run_dir / "results" / (f"{self.name}, all users" if all_users else self.name) / f"{key}.parquet"

    def folder(self, key: str) -> Path:
        """Working folder of a method."""
        return self.run_dir / "clients" / self.name / key


def _trained(ranker: Ranker) -> int:
    """Numbers that some phase of training moved: parameters with gradients, all of a stage-1 module's, a fusion's weights."""
    if not isinstance(ranker, torch.nn.Module):
        return 0
    phased = [] if isinstance(ranker, LLMHead) else [m for m in ranker.modules() if hasattr(m, "local_phases")]
    moved = {id(p) for module in phased for p in module.parameters()}
    fitted = ranker.weights.numel() if isinstance(ranker, LateFusion) else 0
    return fitted + sum(p.numel() for p in ranker.parameters() if p.requires_grad or id(p) in moved)
