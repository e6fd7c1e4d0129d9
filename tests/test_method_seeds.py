"""Rows that are trained beside stage 1 follow the run's seed, from their first weights on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sfubm.methods import METHODS
from tests.conftest import small_distiller


@pytest.mark.parametrize("key", ["gru4rec", "encoder", "id_text", "unisrec_scratch"])
def test_first_weights_and_draws_differ_by_seed_alone(key: str, federated_data: Any) -> None:
    data = federated_data(num_users=30).domains["alpha"]
    data.prepare_data()
    data.setup("fit")

    def untrained(seed: int) -> Any:
        run: Any = SimpleNamespace(trainer=SimpleNamespace(seed=seed), name="alpha", template=small_distiller())
        run.experiment = SimpleNamespace(baselines={})
        run.full_data, run.fit = data, lambda *arguments: None
        return METHODS[key].build(run)

    first, again, other = untrained(1), untrained(1), untrained(2)
    assert (first.seed, other.seed) == (1, 2)  # of negatives and gate noise
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
    first, second = (trainer.local_twin(template, "alpha", number).module for number in (1, 2))
    assert first.seed == template.seed
    assert second.seed not in (template.seed, trainer.seed)
    assert not torch.equal(first.ids.weight, second.ids.weight)


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
    assert sorted(sum(local["1"], [])) == sorted(sum(local["2"], []))
    assert len(hashes) == 1  # what is measured stays the same
