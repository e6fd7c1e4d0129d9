"""Batch samplers: coverage, buckets, ranks, epochs."""

from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.datamodules.batching import BucketBatchSampler, ResumableLoader, SortedBatchSampler, shard_of
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.trainer import FederatedTrainer

SIZES = st.integers(1, 70), st.integers(1, 9), st.integers(1, 4)


def rows_of(sampler) -> list[list[int]]:
    return [index.rows.tolist() for index in sampler]


@given(*SIZES, st.integers(0, 3))
@settings(derandomize=True, deadline=None)
def test_bucketed_ranks_together_are_one_process_with_a_larger_batch(
    total: int, size: int, world: int, epoch: int
) -> None:
    lengths = np.random.default_rng(total).integers(1, 50, total)
    samplers = [
        BucketBatchSampler(lengths, size, seed=3, rank=rank, world_size=world, bucket_batches=2)
        for rank in range(world)
    ]
    single = BucketBatchSampler(lengths, size * world, seed=3, bucket_batches=2)
    for sampler in (*samplers, single):
        sampler.set_epoch(epoch)
    ranks = [rows_of(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}
    whole = rows_of(single)
    assert sorted(chain.from_iterable(whole)) == list(range(total))
    for step, batch in enumerate(whole):
        shares = [ranks[rank][step] for rank in range(world)]
        assert all(shares)  # no rank sits out a step
        dealt = Counter(chain.from_iterable(shares))
        assert dealt.keys() == set(batch)
        assert len(set(dealt.values())) == 1  # none weighs more than another in the mean over all ranks
        if len(batch) >= world:
            assert dealt.total() == len(batch)  # every row once
        else:
            assert all(len(set(share)) == len(share) <= 2 for share in shares)


def test_buckets_cut_padding_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 4000)
    sampler = BucketBatchSampler(lengths, 32, seed=1)
    padding = sum(len(rows) * lengths[rows].max() for _, rows in sampler) / lengths.sum()
    assert padding < 1.1
    first = rows_of(sampler)
    assert rows_of(sampler) == first
    sampler.set_epoch(1)
    second = rows_of(sampler)
    assert second != first
    assert sorted(map(sorted, second)) != sorted(map(sorted, first))  # other batches, not only another order
    assert next(iter(sampler)).epoch == 1


@given(*SIZES)
@settings(derandomize=True, deadline=None)
def test_even_batches_hold_every_row_on_all_ranks_together(total: int, size: int, world: int) -> None:
    lengths = np.random.default_rng(total).integers(1, 50, total)
    samplers = [
        BucketBatchSampler(lengths, size, seed=3, rank=rank, world_size=world, bucket_batches=2, even=True)
        for rank in range(world)
    ]
    ranks = [rows_of(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}
    assert all(batch for batches in ranks for batch in batches)
    assert set(chain.from_iterable(chain.from_iterable(ranks))) == set(range(total))
    if total >= size * world * 2 and total % (size * world) == 0:  # no short batch at the end
        assert sum(len(batch) for batches in ranks for batch in batches) == total


def test_even_batches_have_equal_positions_in_the_buckets_of_the_others() -> None:
    lengths = np.minimum(np.random.default_rng(0).zipf(1.7, 10_000), 50)
    plain, even = (BucketBatchSampler(lengths, 128, seed=1, even=even) for even in (False, True))
    assert len(plain) == len(even) == len(rows_of(even))
    positions = np.array([lengths[rows].sum() for _, rows in even])
    assert positions.max() < 1.2 * positions.min()
    assert max(lengths[rows].sum() for _, rows in plain) > 20 * min(lengths[rows].sum() for _, rows in plain)
    assert sum(len(rows) * lengths[rows].max() for _, rows in even) < 1.1 * lengths.sum()  # padding
    short, long = (np.mean([len(rows) for _, rows in even if holds(lengths[rows])]) for holds in (is_short, is_long))
    assert short > 300
    assert long < 30
    two = [rows_of(BucketBatchSampler(lengths, 64, seed=1, rank=rank, world_size=2, even=True)) for rank in (0, 1)]
    assert [set(a) | set(b) for a, b in zip(*two, strict=True)] == [set(rows) for rows in rows_of(even)]


def is_short(lengths: np.ndarray) -> bool:
    return int(lengths.max()) == 1


def is_long(lengths: np.ndarray) -> bool:
    return int(lengths.min()) == 50


@given(*SIZES)
@settings(derandomize=True, deadline=None)
def test_sorted_ranks_cover_every_row_once(total: int, size: int, world: int) -> None:
    lengths = np.random.default_rng(total).integers(1, 50, total)
    ranks = [rows_of(SortedBatchSampler(lengths, size, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(chain.from_iterable(batch for batches in ranks for batch in batches)) == list(range(total))
    assert all(len(batch) <= max(size, 2 if world > 1 else 1) for batches in ranks for batch in batches)
    if total >= world:
        assert all(batch for batches in ranks for batch in batches)
    flat = [lengths[batch].max() for batch in ranks[0] if batch]
    assert flat == sorted(flat)


@given(*SIZES, st.integers(1, 5))
@settings(derandomize=True, deadline=None)
def test_very_long_histories_share_batches_that_are_cut(total: int, size: int, world: int, long: int) -> None:
    generator = np.random.default_rng(total)
    seen = generator.integers(1, 50, total)
    seen[generator.integers(0, total, long)] = 1000
    lengths = np.minimum(seen, 20)

    def batches(rank: int, limit: int) -> list[list[int]]:
        return rows_of(
            SortedBatchSampler(lengths, size, rank=rank, world_size=world, seen_lengths=seen, seen_ids=limit)
        )

    plain = [rows_of(SortedBatchSampler(lengths, size, rank=rank, world_size=world)) for rank in range(world)]
    assert [batches(rank, size * 1000 + 2000) for rank in range(world)] == plain  # nothing to cut, nothing changed
    ranks = [batches(rank, 1500) for rank in range(world)]
    assert len({len(found) for found in ranks}) == 1
    assert sorted(chain.from_iterable(batch for found in ranks for batch in found)) == list(range(total))
    for found in ranks:
        for rows in filter(None, found):
            assert len(rows) * seen[rows].max() <= 1500 or len(rows) <= (2 if world > 1 else 1)
        assert all(len(rows) <= max(size, 2 if world > 1 else 1) for rows in found)
        flat = [lengths[rows].max() for rows in found if rows]
        assert flat == sorted(flat)


def test_one_very_long_history_pads_few_others() -> None:
    seen = np.full(5000, 60)
    seen[[7, 2500]] = 1_000_000
    batches = SortedBatchSampler(np.full(5000, 50), 512, seen_lengths=seen).batches
    padded = [len(rows) * int(seen[rows].max()) for rows in batches]
    assert max(padded) <= 2**23
    assert sorted(map(len, batches))[-9:] == [500] * 9  # those without are as large as ever
    unsorted = SortedBatchSampler(np.full(5000, 50), 512).batches
    assert max(len(rows) * int(seen[rows].max()) for rows in unsorted) == 500_000_000


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        SortedBatchSampler(np.ones(3), 0)
    with pytest.raises(ConfigError, match="rank 2"):
        BucketBatchSampler(np.ones(3), 2, seed=1, rank=2, world_size=2)


def test_rows_are_not_dealt_out_twice() -> None:
    """Lightning would shard the sampler's share again: half of the rows of two processes were left out in silence."""
    for again, world, refused in ((True, 2, True), (False, 2, False), (True, 1, False)):
        connector = SimpleNamespace(use_distributed_sampler=again)
        trainer = SimpleNamespace(global_rank=0, world_size=world, _accelerator_connector=connector)
        if refused:
            with pytest.raises(ConfigError, match=r"2 processes itself: set trainer\.use_distributed_sampler to false"):
                shard_of(SimpleNamespace(trainer=trainer))
        else:
            assert shard_of(SimpleNamespace(trainer=trainer)) == (0, world)


def test_trainers_of_the_product_leave_sharding_to_the_samplers(tmp_path) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    assert not FederatedTrainer(**quiet)._accelerator_connector.use_distributed_sampler
    assert FederatedTrainer(**quiet, use_distributed_sampler=True)._accelerator_connector.use_distributed_sampler


class Rows:
    """A data set whose batches are their rows."""

    def __getitem__(self, index) -> list[int]:
        return index.rows.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_within_an_epoch_and_within_that_one_only(workers: int) -> None:
    def loader(epoch: int) -> ResumableLoader:
        sampler = BucketBatchSampler(np.arange(1, 41), 5, seed=1, bucket_batches=2)
        sampler.set_epoch(epoch)
        return ResumableLoader(Rows(), sampler, workers)

    whole = list(loader(3))
    assert len(whole) == len(loader(3)) == 8
    first = loader(3)
    given = iter(first)
    taken = [next(given) for _ in range(3)]
    state = first.state_dict()
    resumed, later = loader(3), loader(4)
    resumed.load_state_dict(state)
    later.load_state_dict(state)
    assert taken + list(resumed) == whole
    assert list(resumed) == whole  # the next iteration begins at the start again
    assert list(later) == list(loader(4)) != whole
