"""Leave-one-out and the stage-2 hold-out, as properties of any set of sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.datamodules.sequences import TrainSequences
from lightning_sfubm.datamodules.splits import leave_one_out, retrained, train_counts
from lightning_sfubm.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


@given(LENGTHS, st.integers(0, 3), st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 5))
@settings(derandomize=True, deadline=None)
def test_parts_tile_every_sequence(lengths: list[int], held: int, users: int | None, seed: int) -> None:
    offsets = offsets_of(lengths)
    splits = leave_one_out(offsets, held, users, seed)
    parts = [np.arange(a, b) for a, b in zip(splits.train_start, splits.train_end, strict=True)]
    everything = np.sort(np.concatenate([*parts, splits.stage2, splits.val, splits.test]))
    assert everything.tolist() == list(range(offsets[-1]))  # disjoint, nothing lost
    chosen = set()
    for user, length in enumerate(lengths):
        start, end = offsets[user], offsets[user + 1]
        mine = splits.stage2[splits.stage2_users == user]
        if length < 3:
            assert user not in splits.eval_users
            assert splits.train_end[user] == end
            assert len(mine) == 0
            continue
        place = splits.eval_users.tolist().index(user)
        assert (splits.val[place], splits.test[place]) == (end - 2, end - 1)
        assert splits.stage2_end[user] == end - 2
        assert mine.tolist() == list(range(splits.train_end[user], end - 2))
        if len(mine):
            chosen.add(user)
            assert len(mine) == min(held, length - 4)
            assert splits.train_end[user] - start >= 2
    eligible = [u for u, length in enumerate(lengths) if length >= 5] if held else []
    assert len(chosen) == (len(eligible) if users is None else min(users, len(eligible)))


def test_choice_of_stage2_users_is_seeded_and_nested() -> None:
    offsets = offsets_of([9] * 50)
    few, more = (set(leave_one_out(offsets, 1, n, 1).stage2_users.tolist()) for n in (10, 20))
    assert few < more
    assert few != set(leave_one_out(offsets, 1, 10, 2).stage2_users.tolist())
    assert few != set(leave_one_out(offsets, 1, 10, 1, "other data").stage2_users.tolist())


@pytest.mark.parametrize("positions", [-1, 4])
def test_out_of_range(positions: int) -> None:
    with pytest.raises(ConfigError, match="stage2_positions"):
        leave_one_out(offsets_of([5]), positions)


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(0, 2))
@settings(derandomize=True, deadline=None)
def test_counts_see_stage1_training_only(domain_of, sequences: list[list[int]], held: int) -> None:
    used = sorted({item for sequence in sequences for item in sequence})
    sequences = [[used.index(item) + 1 for item in sequence] for sequence in sequences]
    domain = domain_of(sequences)
    splits = leave_one_out(domain.offsets, held)
    expected = np.zeros(domain.num_items + 1, dtype=int)
    for user, sequence in enumerate(sequences):
        for item in sequence[: splits.train_end[user] - splits.train_start[user]]:
            expected[item] += 1
    assert train_counts(domain, splits).tolist() == expected.tolist()


@given(
    st.lists(st.integers(1, 23), min_size=1, max_size=8),
    st.integers(1, 7),
    st.sampled_from(["last", "all"]),
    st.integers(0, 1),
)
@settings(derandomize=True, deadline=None)
def test_windows(domain_of, lengths: list[int], max_length: int, windows: str, held: int) -> None:
    total = sum(lengths)
    flat = iter(range(1, total + 1))  # every interaction is an item of its own, so items tell positions
    domain = domain_of([[next(flat) for _ in range(length)] for length in lengths])
    splits = leave_one_out(domain.offsets, held)
    rows = TrainSequences(domain, splits, max_length, windows)
    batch = rows.batch(np.arange(len(rows)))
    history, targets = batch["history"].numpy(), batch["targets"].numpy()
    assert history.shape == targets.shape
    assert history.shape[1] <= max_length
    for user, row, aims in zip(batch["user"].tolist(), history, targets, strict=True):
        real = row > 0
        assert not np.any(np.diff(real.astype(int)) < 0)  # left-padded
        assert np.array_equal(aims > 0, real)
        assert np.array_equal(aims[real], row[real] + 1)  # what followed
        assert np.all((row[real] > domain.offsets[user]) & (aims[real] <= splits.train_end[user]))
    found = np.sort(targets[targets > 0])
    assert len(np.unique(found)) == len(found)
    for user in range(domain.num_users):
        start, end = domain.offsets[user], splits.train_end[user]
        mine = found[(found > start) & (found <= end)]
        first = start + 2 if windows == "all" else max(start + 2, end - max_length + 1)
        assert mine.tolist() == list(range(first, end + 1))
    if len(rows):
        assert rows.lengths.tolist() == (history > 0).sum(axis=1).tolist()


def test_users_that_do_not_train_are_tested_all_the_same() -> None:
    offsets = offsets_of([9] * 50)
    splits = leave_one_out(offsets, 2, None, 1, "x", train_users=10)
    assert splits.trained.sum() == 10
    assert len(splits.test) == 50
    lengths = splits.train_end - splits.train_start
    assert lengths[splits.trained].tolist() == [5] * 10
    assert lengths[~splits.trained].tolist() == [0] * 40
    assert set(splits.stage2_users) == set(np.flatnonzero(splits.trained))
    more = leave_one_out(offsets, 2, None, 1, "x", train_users=20)
    assert set(np.flatnonzero(splits.trained)) < set(np.flatnonzero(more.trained))
    with pytest.raises(ConfigError, match="train_users"):
        leave_one_out(offsets, train_users=0)
    for size in (0, -1):
        with pytest.raises(ConfigError, match=f"stage2_users must be at least 1, or none for all users, not {size}"):
            leave_one_out(offsets, 1, stage2_users=size)


@given(LENGTHS, st.integers(0, 3), st.integers(0, 5))
@settings(derandomize=True, deadline=None)
def test_members_and_others_are_cut_alike(lengths: list[int], held: int, seed: int) -> None:
    offsets = offsets_of(lengths)
    whole = leave_one_out(offsets, held, None, seed)
    half = leave_one_out(offsets, held, None, seed, train_users=max(1, len(lengths) // 2))
    everyone = np.ones(len(lengths), dtype=bool)
    assert np.array_equal(retrained(half, everyone, held).train_end, whole.train_end)
    others = retrained(half, ~half.trained, held)
    assert np.array_equal(others.train_end[~half.trained], whole.train_end[~half.trained])
    assert np.array_equal(others.train_end[half.trained], whole.train_start[half.trained])
    assert len(others.stage2) == 0
    evaluated = retrained(half, everyone, 0)
    assert (evaluated.train_end[evaluated.eval_users] == evaluated.val).all()  # never a validation or test item
