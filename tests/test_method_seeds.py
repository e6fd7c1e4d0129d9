"""Rows that are trained beside stage 1 follow the run's seed, from their first weights on."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.experiment import Experiment
from lightning_sfubm.experiment_checks import check_templates
from lightning_sfubm.methods import METHODS
from lightning_sfubm.methods.base import DomainRun, _trained
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.baselines.unisrec import UniSRec, transferable
from lightning_sfubm.modules.baselines.unisrec_pretraining import UniSRecPretraining
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import step_of
from tests.conftest import quiet_trainer, small_distiller, small_federation


@pytest.mark.parametrize("key", ["gru4rec", "encoder", "id_text", "unisrec_scratch"])
def test_first_weights_and_draws_differ_by_seed_alone(key: str, federated_data: Any) -> None:
    data = federated_data(num_users=30).domains["alpha"]
    data.prepare_data()
    data.setup("fit")

    def untrained(seed: int) -> Any:
        run: Any = SimpleNamespace(trainer=SimpleNamespace(seed=seed), name="alpha", template=small_distiller())
        run.experiment = SimpleNamespace(baselines={})
        run.full_data, run.fit = data, lambda *arguments: None
        run.own_encoder = partial(DomainRun.own_encoder, run)
        return METHODS[key].build(run)

    first, again, other = untrained(1), untrained(1), untrained(2)
    assert (first.seed, other.seed) == (1, 2)  # of negatives and gate noise
    # The template's encoder stands still while its teacher is trained; the rows' own does not.
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert all(part.training for part in first.encoder.modules())
    tables = [m.items.state_dict() for m in (first, again, other)]
    drawn = [
        name
        for name in tables[0]
        if name.endswith(("ids.weight", "experts.weight", "weight")) and tables[0][name].any()
    ]
    assert drawn
    for name in drawn:
        assert torch.equal(tables[0][name], tables[1][name]), name
    assert any(not torch.equal(tables[0][name], tables[2][name]) for name in drawn)


def test_a_second_student_of_ones_own_starts_elsewhere(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1, local_max_epochs=1)
    template = small_distiller()
    trainer.fit(template, datamodule=federated_data(num_users=30))
    curves = trainer.run_dir / "csv" / "alpha" / "version_0" / "metrics.csv"
    before = curves.read_text()
    first, second = (trainer.local_twin(template, "alpha", number).module for number in (1, 2))
    assert first.seed == template.seed
    assert second.seed not in (template.seed, trainer.seed)
    assert not torch.equal(first.ids.weight, second.ids.weight)
    assert curves.read_text() == before  # twins have curves of their own
    assert {"alpha, local", "alpha, local-2"} <= {folder.name for folder in (trainer.run_dir / "csv").iterdir()}


def test_batches_come_in_another_order_under_another_seed(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = federated_data(num_users=60).domains["alpha"]
    data.prepare_data()
    data.setup("fit")

    def rows(trainer: Any) -> list[list[int]]:
        data.trainer = trainer
        return [batch.rows.tolist() for batch in data.train_dataloader().sampler]

    local, hashes = {}, set()
    for seed in ("1", "2", "2", ""):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        trainer = federated_trainer()
        order = rows(trainer)
        assert order == rows(trainer.make_trainer(label="a round", max_epochs=1))
        assert local.setdefault(seed, order) == order
        hashes.add(str(data.candidate_hash))
    assert local[""] == rows(None) == local[str(data.seed)] != local["2"]
    first, second = (sorted(row for batch in local[seed] for row in batch) for seed in ("1", "2"))
    assert first == second == sorted(set(first))
    assert len(hashes) == 1  # what is measured stays the same


def test_samples_of_the_second_stage_are_the_same_under_every_seed_and_their_order_is_not(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = federated_data(num_users=60).domains["alpha"]
    data.prepare_data()
    ranking = RankingDataModule(data, batch_size=4, train_candidates=5, max_train_users=20, max_test_users=10, seed=1)

    def epoch(seed: str) -> tuple[list[int], list[list[int]], list[int]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        ranking.trainer = federated_trainer().make_trainer(label="tuning", max_epochs=1)
        ranking.setup("fit")
        batches = list(ranking.train_dataloader())
        test = [user for batch in ranking.test_dataloader() for user in batch["user"].tolist()]
        users = [user for batch in batches for user in batch["user"].tolist()]
        return users, [row for batch in batches for row in batch["candidates"].tolist()], test

    (users, lists, test), again, (other_users, other_lists, other_test) = map(epoch, ("1", "1", "2"))
    assert (users, lists, test) == again
    assert sorted(users) == sorted(other_users)
    assert len(users) == 20
    assert users != other_users
    assert test == other_test
    assert dict(zip(users, map(sorted, lists), strict=True)) != dict(
        zip(other_users, map(sorted, other_lists), strict=True)
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_batches_of_one_accumulated_step_draw_negatives_of_their_own(
    accumulated: int, federated_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = federated_data(num_users=60).domains["alpha"]
    data.batch_size = 16
    data.prepare_data()
    data.setup("fit")
    module = SequentialRecommender(SASRec(hidden_dim=16, num_layers=1, max_length=16), loss="sampled", num_negatives=5)
    drawn: list[tuple[int, list[int]]] = []
    original = module._negatives

    def watched(targets: torch.Tensor) -> torch.Tensor:
        drawn.append((module.global_step, original(targets).tolist()))
        return original(targets)

    monkeypatch.setattr(module, "_negatives", watched)
    module.bind(data.catalogue)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(accelerator="cpu", max_epochs=2, accumulate_grad_batches=accumulated, limit_val_batches=0, **quiet).fit(
        module, datamodule=data
    )
    steps, negatives = zip(*drawn, strict=True)
    assert len(set(map(str, negatives))) == len(negatives) >= 6
    assert len(set(steps)) == len(steps) // accumulated
    if accumulated == 1:  # as before gradients could be accumulated
        assert step_of(SimpleNamespace(trainer=module.trainer)) == (module.global_step,)


def test_pre_training_trains_an_encoder_that_is_to_stand_still_afterwards() -> None:
    frozen = SASRec(hidden_dim=16, num_layers=1, max_length=16).requires_grad_(False).eval()
    module = UniSRecPretraining(frozen)
    assert all(parameter.requires_grad for parameter in module.encoder.parameters())
    assert all(part.training for part in module.encoder.modules())


def test_a_pre_trained_row_does_not_depend_on_the_rows_before_it(tmp_path: Path) -> None:
    """Pre-training is done within the first row that needs it: what it draws must not move that row's own draws."""
    ranks = []
    for name, methods in (("alone", ["transductive"]), ("after", ["inductive", "transductive"])):
        rows = [f"unisrec_{mode}" for mode in methods]
        trainer = quiet_trainer(tmp_path / name, rounds=1)
        Experiment(methods=rows).run(trainer, small_distiller(), small_federation(num_users=40), config_hash="h")
        results = sorted((tmp_path / name / "results").glob("*/unisrec_transductive.parquet"))
        assert len(results) == 2
        ranks.append([PerUserResults.load(path).full_rank for path in results])
    for alone, after in zip(*ranks, strict=True):
        assert np.array_equal(alone, after)


def test_parameters_that_are_counted_as_trained_were(federated_data: Any) -> None:
    data = federated_data(num_users=30).domains["alpha"]
    data.prepare_data()
    data.setup("fit")
    students = small_distiller()  # in the phase of its teacher: its own encoder stands still just now
    students.bind(data.catalogue)
    everything = sum(parameter.numel() for parameter in students.parameters())
    assert _trained(students) == everything
    fusion = LateFusion(students)
    assert _trained(fusion) == fusion.weights.numel()  # it builds on a stage 1, whose numbers are counted there
    tuned = UniSRec(SASRec(hidden_dim=16, num_layers=1, max_length=16))
    tuned.bind(data.catalogue)
    before = _trained(tuned)
    tuned.load_pretrained({name: value.detach() for name, value in transferable(tuned).items()})
    assert _trained(tuned) == before - sum(parameter.numel() for parameter in tuned.encoder.parameters())


def test_forms_of_a_template_that_rows_need_are_read_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("list: {question: 'Which {absent}?'}\n")
    llm = LLMHead(llm=str(write_tiny_llm(tmp_path / "llm")), template="shopping", history_length=3, title_tokens=6)
    templates = {"alpha": str(tmp_path / "words.yaml")}
    check_templates(["zero_shot"], llm, templates, ["alpha"])
    for row in ("tallrec", "sfubm_list"):
        with pytest.raises(ConfigError, match=r"words\.yaml"):
            check_templates([row], llm, templates, ["alpha"])
