"""Rows of a table: what they are called, what may be configured for them, and what they are said to cost."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.experiment import COMPARISONS, Experiment
from lightning_sfubm.methods import METHODS
from lightning_sfubm.methods.base import TWINS, DomainRun
from lightning_sfubm.methods.stage1 import FUSED_TWINS
from lightning_sfubm.modules.baselines.unisrec import UniSRec
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.training import Stopwatch


class Mean(GRU4Rec):
    """Another model under the class of a known one."""

    def forward(self, item_embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (item_embeddings * mask.unsqueeze(-1)).cumsum(1)


def domain_run(watch: Stopwatch, shared: dict[str, Any], template: Any = None, **baselines: Any) -> DomainRun:
    experiment: Any = SimpleNamespace(baselines=baselines)
    parts: Any = SimpleNamespace()
    return DomainRun(experiment, parts, template, "alpha", parts, watch, parts, shared)


def test_what_the_report_compares_are_rows_and_every_fusion_is_among_them() -> None:
    compared = {method for pair in COMPARISONS for method in pair}
    assert compared <= METHODS.keys()
    assert compared >= {"late_fusion", "late_fusion_counts", "late_fusion_products", *FUSED_TWINS, *TWINS}
    assert len(COMPARISONS) == len(set(COMPARISONS))


def test_a_row_is_called_by_the_encoder_that_it_trains() -> None:
    sasrec = SequentialRecommender(SASRec(hidden_dim=8, num_layers=1))
    template = FKDDistiller(GRU4Rec(hidden_dim=8))
    label = METHODS["encoder"]
    assert domain_run(Stopwatch(), {}, template).label(label) == "GRU4Rec alone"
    assert domain_run(Stopwatch(), {}, template, encoder=sasrec).label(label) == "SASRec alone"


def test_the_unisrec_that_is_fused_is_trained_without_what_the_fusion_is_weighed_on(
    federated_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = federated_data(num_users=30).domains["alpha"]
    data.prepare_data()
    data.setup("fit")
    run = domain_run(Stopwatch(), {}, FKDDistiller(SASRec(hidden_dim=8, num_layers=1)))
    run.trainer.seed, run.client.datamodule = 1, data
    trained_on: list[Any] = []
    monkeypatch.setattr(DomainRun, "fit", lambda self, module, key, datamodule: trained_on.append(datamodule))
    weighed_on: list[str] = []
    ranked = data.rank_dataloader
    monkeypatch.setattr(
        data, "rank_dataloader", lambda split, *a, **k: weighed_on.append(split) or ranked(split, *a, **k)
    )
    fusion = METHODS["unisrec_fusion_products"].build(run)
    assert trained_on == [data]
    assert data.stage2_positions == 1  # held out of it
    assert weighed_on == ["train2", "val"]
    batch = next(iter(ranked("test", 8)))
    scores = fusion.rank(batch)
    assert scores.shape == batch["candidates"].shape
    assert len(fusion.weights) == 9 * 12 // 2  # UniSRec's score, three similarities, five counts, and products


@pytest.mark.parametrize(
    ("key", "module", "words"),
    [
        (
            "id_text",
            SequentialRecommender(SASRec()),
            "id_text has features 'id', but row 'id_text' is called 'ID + text",
        ),
        ("encoder", SequentialRecommender(SASRec(), features="text"), "set it to 'id'"),
        ("sasrec_bce", SequentialRecommender(SASRec()), "set it to 'bce'"),
        (
            "gru4rec",
            SequentialRecommender(SASRec(8)),
            "gru4rec has an encoder SASRec, but row 'gru4rec' is called 'GRU4Rec': make it a GRU4Rec",
        ),
        ("gru4rec", SequentialRecommender(Mean(8)), "gru4rec has an encoder Mean, but row"),
        ("sasrec_bce", SequentialRecommender(GRU4Rec(8), loss="bce"), "sasrec_bce has an encoder GRU4Rec"),
        ("unisrec_transductive", UniSRec(), "set it to 'transductive'"),
        ("stage1", SequentialRecommender(SASRec()), "names 'stage1'; rows that take a module are gru4rec, sasrec_bce"),
        ("popularity", SequentialRecommender(SASRec()), "names 'popularity'"),
    ],
)
def test_a_baseline_that_no_row_reads_or_that_is_not_what_its_label_says_is_refused(
    key: str, module: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=r"experiment\.baselines") as error:
        Experiment(methods=["popularity"], baselines={key: module})
    assert words in str(error.value)


def test_a_baseline_may_be_of_a_subclass_that_computes_the_same() -> None:
    class Narrow(GRU4Rec):
        def __init__(self) -> None:
            super().__init__(hidden_dim=8)

    Experiment(methods=["gru4rec"], baselines={"gru4rec": SequentialRecommender(Narrow())})
    Experiment(methods=["encoder"], baselines={"encoder": SequentialRecommender(Mean(8))})


def test_a_patience_is_of_a_training_that_has_one() -> None:
    for name in ("encoder", "unisrec_pretraining", "recommender", "a_llmrec_alignment", "pooled_teacher"):
        Experiment(methods=["popularity"], patience={name: 2})
    for name in ("stage1", "popularity", "tallrec", "a_llmrec"):
        with pytest.raises(
            ConfigError, match=f"patience names \\['{name}'\\]; trainings with a patience are a_llmrec_al"
        ):
            Experiment(methods=["popularity"], patience={name: 2})


def test_a_number_of_users_below_one_is_refused() -> None:
    for settings in ({"max_train_users": 0}, {"max_test_users": -1}, {"calibration_users": -5}):
        (name,) = settings
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            Experiment(methods=["popularity"], **settings)
    Experiment(methods=["popularity"], calibration_users=0)  # no calibration


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"llm_epochs": -1}, "llm_epochs must be 1"),  # would train for ever
        ({"llm_batch_size": 0}, "llm_batch_size must be 1"),
        ({"llm_eval_batch_size": 0}, "llm_eval_batch_size must be 1"),
        ({"train_candidates": 1}, "train_candidates must be 2"),
        ({"align_epochs": -1}, "align_epochs must be 0"),
        ({"text_samples": -1}, "text_samples must be 0"),
        ({"patience": {"encoder": 0}}, r"patience\['encoder'\] must be 1"),
        ({"sigmas": [0.1, -1.0]}, r"sigmas\[1\] must be 0.0"),
        ({"sigmas": [float("nan")]}, r"sigmas\[0\] must be 0.0"),
    ],
)
def test_sizes_out_of_range_are_refused_before_anything_is_trained(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"experiment\\.{named} or more, got"):
        Experiment(methods=["popularity"], **settings)


def test_what_rows_have_in_common_is_no_cost_of_the_one_that_asks_first() -> None:
    def work(seconds: float) -> int:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return 1

    watch, shared = Stopwatch(), dict[str, Any]()
    first, second = domain_run(watch, shared), domain_run(watch, shared)

    def row(run: DomainRun, key: str) -> float:
        before = run.spent_on("row")
        with watch("train row"):
            run.once(key, "in common", lambda: run.once(f"{key} within", "within", lambda: work(0.15)) and work(0.15))
            work(0.05)
        return run.spent_on("row") - before

    # One thing for both domains, then one of each.
    costs = [row(first, "all"), row(second, "all"), row(first, "all"), row(first, "first"), row(second, "second")]
    assert all(0.04 < cost < 0.14 for cost in costs), costs
    assert watch.timings["train in common"]["cpu_s"] > 3 * 0.29
