"""The methods an experiment can compare: how each row of the table comes to its ranker."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.item_datamodule import ItemDataModule
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.evaluate import evaluate_ranker
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.baselines.popularity import Popularity
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.prompt_projector import PromptProjector
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import derive_seed
from lightning_sfubm.training import Stopwatch, fit_to_early_stopping

if TYPE_CHECKING:
    from lightning_sfubm.experiment import Experiment


@dataclass(frozen=True)
class Method:
    """A row: its label, the heading it stands under, and how its ranker is made for one domain."""

    label: str
    group: str
    build: Callable[["DomainRun"], Ranker]
    needs_llm: bool = False


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
    ) -> None:
        self.experiment, self.trainer, self.template = experiment, trainer, template
        self.name, self.client, self.watch, self.run_dir = name, client, watch, run_dir

    @property
    def data(self) -> DomainDataModule:
        """The domain's data, with positions held out for stage 2."""
        return self.client.datamodule  # type: ignore[return-value]

    @property
    def stage1(self) -> Any:
        """The trained stage-1 module."""
        return self.client.module

    @cached_property
    def full_data(self) -> DomainDataModule:
        """The same data without a hold-out, for methods that have no second stage."""
        data = self.data.without_holdout()
        data.setup("fit")
        return data

    @cached_property
    def ranking_data(self) -> RankingDataModule:
        """Samples of the LLM stage, and the test users on whom all rows are compared."""
        experiment = self.experiment
        return RankingDataModule(
            self.data,
            batch_size=experiment.llm_batch_size,
            eval_batch_size=experiment.llm_eval_batch_size,
            train_candidates=experiment.train_candidates,
            max_train_users=experiment.max_train_users,
            max_test_users=experiment.max_test_users,
            seed=self.data.seed,
        )

    @cached_property
    def fusion(self) -> LateFusion:
        """Late fusion fitted on all held-out samples, more than the LLM may get; the LLM head starts from its weights."""
        fusion = LateFusion(self.stage1)
        fusion.fit(self.data.rank_dataloader("train2", 256))
        return fusion

    def train_cpu_s(self, key: str, cpu_s: float) -> float | None:
        """CPU seconds a row's training took: for a stage-1 row those of its client, else what was measured."""
        if key == "stage1":
            return self.client.train_cpu_s
        return self.trainer.local_twin(self.template, self.name).train_cpu_s if key == "stage1_local" else cpu_s

    @property
    def has_larger_test(self) -> bool:
        """Whether there are test users beyond those all rows are compared on."""
        limit = self.experiment.max_test_users
        return limit is not None and limit < len(self.data.splits.eval_users)

    def evaluate(
        self, ranker: Ranker, key: str, order: int, extra: dict[str, Any], all_users: bool = False
    ) -> PerUserResults:
        """Rank the stored test candidates."""
        method = METHODS[key]
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
            label=self.label(key),
            group=method.group,
            order=order,
            domain=self.name,
            split="test",
            seed=self.trainer.seed,
            candidate_hash=self.data.candidate_hash["test"],
            data_fingerprint=self.data.domain.fingerprint,
            extra=extra,
            trainable_params=_trained(ranker),
            device=self.trainer.strategy.root_device,
        )

    def label(self, key: str) -> str:
        """What the table calls a row; the encoder goes by its own name."""
        return METHODS[key].label.format(encoder=type(getattr(self.template, "encoder", None)).__name__)

    def folder(self, key: str) -> Path:
        """Working folder of a method."""
        return self.run_dir / "clients" / self.name / key


def _trained(ranker: Ranker) -> int:
    """Parameters that some phase of training moved: an LLM's are those with gradients, a stage-1 module's are all."""
    if not isinstance(ranker, torch.nn.Module):
        return 0
    return sum(p.numel() for p in ranker.parameters() if p.requires_grad or not isinstance(ranker, LLMHead))


def _popularity(run: DomainRun) -> Ranker:
    return Popularity(run.full_data.catalogue)


def _sequential(features: str) -> Callable[[DomainRun], Ranker]:
    def build(run: DomainRun) -> Ranker:
        federation = run.trainer.federation
        encoder = getattr(run.template, "encoder", None)
        if federation is None or encoder is None:
            raise ConfigError(
                "single-domain rows take their encoder from model.encoder, which this model does not have"
            )
        torch.manual_seed(derive_seed(run.trainer.seed, "baseline", features, run.name))
        module = SequentialRecommender(copy.deepcopy(encoder), features=features, lr=run.template.lr)  # type: ignore[arg-type]
        module.bind(run.full_data.catalogue)
        fit_to_early_stopping(
            run.trainer.make_trainer,
            module,
            run.full_data,
            label=f"{features}, {run.name}",
            folder=run.folder(features),
            max_epochs=federation.local_max_epochs,
            min_epochs=federation.local_min_epochs,
            patience=federation.patience,
            monitor=federation.monitor,
        )
        return module

    return build


def _stage1(run: DomainRun) -> Ranker:
    return run.stage1


def _stage1_local(run: DomainRun) -> Ranker:
    return run.trainer.local_twin(run.template, run.name).module  # type: ignore[return-value]


def _late_fusion(run: DomainRun) -> Ranker:
    return run.fusion


def _head(run: DomainRun, **changes: Any) -> LLMHead:
    template = run.experiment.llm
    assert template is not None
    names = inspect.signature(type(template).__init__).parameters
    settings = {k: v for k, v in template.hparams.items() if k in names}
    settings["template"] = run.experiment.templates.get(run.name, settings["template"])
    return type(template)(**{**settings, **changes})


def _tune(run: DomainRun, head: LLMHead, key: str) -> LLMHead:
    torch.manual_seed(derive_seed(run.trainer.seed, "llm", key, run.name))
    trainer = run.trainer.make_trainer(
        label=f"{run.label(key)}, {run.name}",
        max_epochs=run.experiment.llm_epochs,
        folder=run.folder(key),
        client=f"{run.name}-{key}",
        precision="32-true",  # the head sets its own
        gradient_clip_val=1.0,
        limit_val_batches=0,
    )
    trainer.fit(head, datamodule=run.ranking_data)
    trainer.save_checkpoint(run.run_dir / "models" / run.name / f"{key}.ckpt", weights_only=True)
    return head


def _zero_shot(subtract_prior: bool) -> Callable[[DomainRun], Ranker]:
    def build(run: DomainRun) -> Ranker:
        untuned = {"rank_mode": "score", "subtract_prior": subtract_prior, "tuning": "frozen", "residual": False}
        head = _head(run, form="branch", **untuned)
        head.attach_stage1(None, run.data.catalogue)
        return head

    return build


def _text_lora(run: DomainRun) -> Ranker:
    head = _head(run, user_token=False, item_tokens=False, semantic_token=False, affinity_token=False, residual=False)
    head.attach_stage1(None, run.data.catalogue)
    return _tune(run, head, "text_lora")


def _align(run: DomainRun) -> str | None:
    """Train the projectors alone (title alignment); returns their checkpoint, ``None`` where no epochs are asked for."""
    template, epochs = run.experiment.llm, run.experiment.align_epochs
    if not epochs:
        return None
    assert template is not None
    projector = PromptProjector(template.hparams["llm"], title_tokens=template.hparams["title_tokens"])
    projector.attach_stage1(run.stage1, run.data.catalogue)
    trainer = run.trainer.make_trainer(
        label=f"alignment, {run.name}", max_epochs=epochs, folder=run.folder("projector")
    )
    trainer.fit(projector, datamodule=ItemDataModule(run.data, seed=run.data.seed))
    path = run.run_dir / "models" / run.name / "projector.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    return str(path)


def _sfubm(run: DomainRun) -> Ranker:
    head = _head(run, projector_checkpoint=_align(run))
    head.attach_stage1(run.stage1, run.data.catalogue)
    if head.residual_weights is not None:
        head.init_residual(run.fusion.weights)
    return _tune(run, head, "sfubm")


METHODS: dict[str, Method] = {
    "popularity": Method("Popularity", "Reference", _popularity),
    "encoder": Method("{encoder} alone", "One domain", _sequential("id")),
    "id_text": Method("ID + text, one encoder", "Controls without an LLM", _sequential("id+text")),
    "stage1_local": Method("Stage 1 without federation", "Ours, stage 1", _stage1_local),
    "stage1": Method("SF-UBM stage 1", "Ours, stage 1", _stage1),
    "late_fusion": Method("Late fusion of stage 1 and text", "Controls without an LLM", _late_fusion),
    "zero_shot": Method("Zero-shot LLM", "LLM", _zero_shot(False), needs_llm=True),
    "zero_shot_prior": Method("Zero-shot LLM, less the title's prior", "LLM", _zero_shot(True), needs_llm=True),
    "text_lora": Method("Text-only LoRA", "LLM", _text_lora, needs_llm=True),
    "sfubm": Method("SF-UBM", "Ours, both stages", _sfubm, needs_llm=True),
}
