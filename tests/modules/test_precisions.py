"""Every module trains and ranks under the precisions that a trainer offers."""

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.item_datamodule import ItemDataModule
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.datamodules.union_datamodule import UnionDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.ffmsr import FFMSR
from lightning_sfubm.modules.baselines.unisrec import UniSRec
from lightning_sfubm.modules.baselines.unisrec_pretraining import UniSRecPretraining
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.prompt_projector import PromptProjector
from lightning_sfubm.modules.sequential import SequentialRecommender
from tests.conftest import small_distiller

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


@pytest.fixture
def data(federated_data: Any) -> DomainDataModule:
    datamodule: DomainDataModule = federated_data(num_users=30).domains["alpha"]
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def trainer(precision: Any, **flags: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        limit_train_batches=2,
        limit_val_batches=1,
        **quiet,
        **flags,
    )


def encoder() -> SASRec:
    return SASRec(hidden_dim=16, num_layers=1, max_length=16)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"features": "id+text", "logits": "cosine"},
        {"loss": "sampled", "num_negatives": 5},
        {"loss": "bpr_max", "num_negatives": 5},
        {"loss": "bce"},
        {"item_init": "cooccurrence"},
    ],
)
def test_sequential_recommenders(precision: str, settings: dict[str, Any], data: DomainDataModule) -> None:
    fitted(SequentialRecommender(encoder(), **settings), data, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("phase", ["teacher", "student", "joint"])
def test_the_distiller_with_what_came_back(precision: str, phase: str, data: DomainDataModule) -> None:
    module = small_distiller(phase=phase, counter="both")
    module.bind(data.catalogue)
    module.receive_semantics(module.semantics().flip(0))
    fitted(module, data, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [UniSRec, partial(FFMSR, text_layers=1)])
def test_text_baselines(precision: str, kind: Any, data: DomainDataModule) -> None:
    fitted(kind(encoder()), data, precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_contrastive_pretraining(precision: str, federated_data: Any) -> None:
    domains = federated_data(num_users=30).domains
    for domain in domains.values():
        domain.prepare_data()
        domain.setup("fit")
    union = UnionDataModule({name: domain.without_holdout() for name, domain in domains.items()}, batch_size=16)
    trainer(precision, use_distributed_sampler=False).fit(UniSRecPretraining(encoder()), datamodule=union)


def fitted(module: Any, data: DomainDataModule, precision: str) -> None:
    """Train two steps, validate, and rank in the precision and, afterwards, without it."""
    module.bind(data.catalogue)
    before = copy.deepcopy(module.state_dict())
    trainer(precision).fit(module, datamodule=data)
    assert any(not torch.equal(before[name], value) for name, value in module.state_dict().items())
    results = trainer(precision).test(module, datamodule=data, verbose=False)
    assert all(torch.isfinite(torch.tensor(value)) for values in results for value in values.values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"affinity_token": True},
        {"form": "list"},
        {"form": "list", "rank_mode": "constrained"},
        {"rank_mode": "score"},
    ],
)
def test_an_llm_head_computes_in_its_own_precision(settings: dict[str, Any], tiny: str, data: DomainDataModule) -> None:
    """Under a trainer's autocast the same numbers as without."""
    ranking = RankingDataModule(data, batch_size=4, train_candidates=4, max_train_users=8, max_test_users=6)
    stage1 = small_distiller(phase="student")
    stage1.bind(data.catalogue)
    scores = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        head = LLMHead(tiny, history_length=3, title_tokens=4, precision="32", **settings)
        head.attach_stage1(stage1, data.catalogue)
        fitting = trainer(precision)
        fitting.fit(head, datamodule=ranking)
        predictions: Any = fitting.predict(head, datamodule=ranking)
        scores.append(torch.cat(predictions))
    assert torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_projectors_align_under_autocast_too(precision: str, tiny: str, data: DomainDataModule) -> None:
    stage1 = small_distiller(phase="student")
    stage1.bind(data.catalogue)
    projector = PromptProjector(tiny, title_tokens=4)
    projector.attach_stage1(stage1, data.catalogue)
    trainer(precision).fit(projector, datamodule=ItemDataModule(data))


def test_rows_alone_are_not_moved_under_scaled_gradients(data: DomainDataModule) -> None:
    module = SequentialRecommender(encoder(), loss="sampled", num_negatives=5, item_updates="rows")
    module.bind(data.catalogue)
    fitting = trainer("32-true")
    fitting.strategy.precision_plugin.precision = "16-mixed"  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"not scaled: set trainer\.precision to bf16-mixed or 32-true"):
        fitting.fit(module, datamodule=data)
