"""Whom membership inference asks about: both groups, their training parts alone, and losses that are the model's own."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_sfubm.audit.attack import _labels
from lightning_sfubm.audit.subjects import sequence_losses, subjects, trained_items
from lightning_sfubm.errors import DataError
from tests.conftest import small_distiller


@pytest.fixture
def data(federated_data: Any) -> Any:
    domain = federated_data(domains=1, num_users=60, num_items=96, train_users=30).domains["alpha"]
    domain.setup("fit")
    return domain


def test_members_are_those_that_train_and_no_later_item_is_seen(data: Any) -> None:
    who = subjects(data, 1000, seed=1)
    assert np.array_equal(who.member.numpy(), data.splits.trained[who.users])
    assert (int(who.member.sum()), int((~who.member).sum())) == (30, 30)
    train = {int(user): batch for batch in data.train_dataloader() for user in batch["user"]}
    assert set(train) == set(who.users[who.member.numpy()])
    for row, user in enumerate(who.users):
        sequence = data.domain.sequence(user)
        known = [*who.history[row][who.history[row] > 0].tolist(), int(who.targets[row, -1])]
        assert known == sequence[: len(sequence) - 3][-len(known) :].tolist()  # one held out, validation, test
    for batch in data.train_dataloader():
        for row, user in enumerate(batch["user"].tolist()):
            place = int(np.flatnonzero(who.users == user)[0])
            mine, asked = batch["history"][row], who.history[place]
            assert mine[mine > 0].tolist() == asked[asked > 0].tolist()


def test_a_limit_draws_as_many_of_both(data: Any) -> None:
    who = subjects(data, 20, seed=1)
    assert (int(who.member.sum()), int((~who.member).sum())) == (10, 10)
    assert not np.array_equal(who.users, subjects(data, 20, seed=2).users)


def test_users_with_nothing_to_predict_are_not_asked_about(federated_data: Any) -> None:
    domain = federated_data(domains=1, num_users=60, num_items=96, train_users=30, item_share=0.3).domains["alpha"]
    domain.setup("fit")
    lengths = np.diff(domain.domain.offsets)
    before_validation = np.where(lengths >= 3, lengths - 2, lengths)
    left = before_validation - (before_validation >= 3) * (lengths >= 3)  # one is held out where two remain
    assert 0 < (left < 2).sum() < len(left)
    who = subjects(domain, 1000, seed=1)
    assert sorted(who.users) == np.flatnonzero(left >= 2).tolist()
    assert (who.targets != 0).any(dim=1).all()


def test_without_held_out_users_there_is_nobody_to_compare_with(federated_data: Any) -> None:
    domain = federated_data(domains=1).domains["alpha"]
    domain.setup("fit")
    with pytest.raises(DataError, match="set") as raised:
        subjects(domain, 100, seed=1)
    assert "train_users" in str(raised.value)


def test_trained_items_are_those_of_the_training_batches(data: Any) -> None:
    seen = torch.zeros(data.num_items + 1, dtype=torch.bool)
    for batch in data.train_dataloader():
        seen[batch["history"].flatten()] = True
        seen[batch["targets"].flatten()] = True
    assert torch.equal(trained_items(data), seen[1:])
    assert 0 < int(trained_items(data).sum()) < data.num_items


def test_popularity_is_told_in_thirds_of_the_items(data: Any) -> None:
    thirds = _labels(data, 10)["popularity, in thirds"]
    counts = data.catalogue.train_counts[1:]
    sizes = torch.bincount(thirds)
    assert len(sizes) == 3
    assert sizes.max() - sizes.min() <= 1
    for lower, upper in ((0, 1), (1, 2)):
        assert counts[thirds == lower].max() <= counts[thirds == upper].min()


def test_the_loss_of_a_sequence_is_that_of_a_plain_loop(data: Any) -> None:
    module = small_distiller()
    module.bind(data.catalogue)
    who = subjects(data, 12, seed=1)
    module.train()
    losses = sequence_losses(module.teacher, who)
    assert module.teacher.training
    module.eval()
    teacher = module.teacher
    with torch.no_grad():
        table = teacher.table()
        for row in range(len(who.users)):
            terms = []
            for place in torch.nonzero(who.targets[row]).flatten().tolist():
                states, items = teacher.scaled(
                    teacher.states(who.history[row : row + 1, : place + 1], table)[:, -1], table
                )
                terms.append(F.cross_entropy(states @ items[1:].T, who.targets[row, place : place + 1] - 1))
            torch.testing.assert_close(losses[row], torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)
