from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.preference_datamodule import PreferenceDataModule
from lightning_sfubm.datamodules.synthetic import SyntheticReader
from lightning_sfubm.errors import ConfigError, DataError


@pytest.fixture
def domain(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path))
    data = DomainDataModule("alpha", SyntheticReader(num_users=60, num_items=48), k_core=0, stage2_positions=2)
    data.prepare_data()
    data.setup()
    return data


def everything(data):
    rows = data.train_rows()
    return rows, rows.batch(np.arange(len(rows)))


@pytest.mark.parametrize("shots", [16, 64])
def test_few_shots_are_balanced_fixed_and_nested(domain, shots):
    rows, batch = everything(PreferenceDataModule(domain, shots=shots))
    assert len(rows) == shots
    assert batch["labels"].sum() == shots // 2
    assert batch["candidates"].shape == batch["labels"].shape == (shots, 1)
    assert batch["disliked"].shape == (shots, 3)
    _, same = everything(PreferenceDataModule(domain, shots=shots))
    larger, _ = everything(PreferenceDataModule(domain, shots=shots + 10))
    other, _ = everything(PreferenceDataModule(domain, shots=shots, seed=2))
    assert all(torch.equal(value, same[name]) for name, value in batch.items())
    assert np.array_equal(rows.chosen, larger.chosen[:shots])
    assert not np.array_equal(rows.chosen, other.chosen)


def test_what_is_said_of_a_user(domain):
    """A 1 is the item that followed; what is disliked or drawn lies outside the training history."""
    rows, batch = everything(PreferenceDataModule(domain, shots=None))
    assert len(rows) == len(domain.splits.stage2)
    positions = domain.splits.stage2[rows.chosen]
    for row, user in enumerate(batch["user"].tolist()):
        known = domain.domain.items[domain.domain.offsets[user] : domain.splits.stage2_end[user]]
        judged, label = batch["candidates"][row, 0].item(), batch["labels"][row, 0].item()
        assert (judged == domain.domain.items[positions[row]]) == bool(label)
        others = [*batch["disliked"][row].tolist(), *([] if label else [judged])]
        assert not set(others) & set(known.tolist())
        assert len(set(others)) == len(others)
        start = domain.domain.offsets[user]
        past = domain.domain.items[start : positions[row]]
        assert batch["history"][row][batch["history"][row] > 0].tolist() == past.tolist()


def test_epochs_say_the_same_in_another_order(domain):
    loader = PreferenceDataModule(domain, shots=20, batch_size=4).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["user"]) for batch in batches] == [4] * 5
        rows = [
            tuple(torch.cat([batch[name][row] for name in ("disliked", "candidates", "labels")]).tolist())
            for batch in batches
            for row in range(4)
        ]
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_judges_the_target_and_one_drawn_item(domain, split):
    data = PreferenceDataModule(domain, max_val_users=10, max_test_users=10, eval_batch_size=4)
    batches = list(getattr(data, f"{split}_dataloader")())
    assert sum(len(batch["user"]) for batch in batches) == 10
    targets = dict(zip(domain.splits.eval_users, domain.domain.items[getattr(domain.splits, split)], strict=True))
    for batch in batches:
        assert batch["labels"].tolist() == [[1, 0]] * len(batch["user"])
        for row, user in enumerate(batch["user"].tolist()):
            own = domain.domain.sequence(user)
            assert batch["candidates"][row, 0] == targets[user]
            said = torch.cat([batch["disliked"][row], batch["candidates"][row, 1:]])
            assert not np.isin(said.numpy(), own).any()


def test_a_rank_without_a_user_has_an_empty_batch(domain):
    data = PreferenceDataModule(domain, max_test_users=1)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    (batch,) = data.test_dataloader()
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "history": (0, 1), "disliked": (0, 3), "candidates": (0, 2), "labels": (0, 2), "user": (0,)
    }  # fmt: skip


def test_nothing_disliked_and_bad_sizes(domain):
    _, batch = everything(PreferenceDataModule(domain, shots=4, num_disliked=0))
    assert batch["disliked"].shape == (4, 0)
    with pytest.raises(ConfigError, match="shots=1"):
        PreferenceDataModule(domain, shots=1)
    with pytest.raises(DataError, match="10000 are asked for"):
        PreferenceDataModule(domain, shots=10_000).train_rows()
