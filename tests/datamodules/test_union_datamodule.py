"""The union of domains: numbering, mixing, determinism, ranks, and nothing but training positions in training batches."""

from itertools import chain

import numpy as np
import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.sequences import TrainSequences
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.datamodules.union_datamodule import UnionBatchSampler, UnionDataModule, drop_words
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.seeds import numpy_generator

SIZES = {"a": (0, 90, 60), "b": (1, 50, 48)}


def domain(name: str, **settings) -> DomainDataModule:
    index, users, items = SIZES[name]
    reader = SyntheticReader(index, num_users=users, num_items=items)
    return DomainDataModule(
        name, reader, **{"text_encoder": HashingTextEncoder(16), "k_core": 0, "max_length": 10, **settings}
    )


def union(names: str = "ab", domain_settings: dict | None = None, **settings) -> UnionDataModule:
    data = UnionDataModule({n: domain(n, **(domain_settings or {})) for n in names}, **{"batch_size": 32, **settings})
    data.prepare_data()
    data.setup()
    return data


def as_rows(batch: dict, number: int, by: int, users: int) -> set[tuple]:
    """(user, history, targets) of one domain's rows, in the domain's own numbering and without padding."""
    chosen = batch["domain"] == number
    return {
        (int(user) - users, tuple((h[h > 0] - by).tolist()), tuple((t[t > 0] - by).tolist()))
        for user, h, t in zip(*(batch[key][chosen] for key in ("user", "history", "targets")), strict=True)
    }


@pytest.mark.parametrize("windows", ["last", "all"])
def test_training_rows_are_those_of_each_domain(windows: str) -> None:
    """T15: an epoch holds every domain's own training rows once, ids shifted, and nothing else."""
    data = union(domain_settings={"windows": windows, "stage2_positions": 1})
    batches = list(data.train_dataloader())
    offsets = {"a": (0, 0, 0), "b": (1, 60, 90)}
    for name, (number, by, users) in offsets.items():
        own = data.domains[name]
        rows = TrainSequences(own.domain, own.splits, own.max_length, own.windows)
        expected = rows.batch(np.arange(len(rows)))
        found = [as_rows(batch, number, by, users) for batch in batches]
        assert sum(map(len, found)) == len(rows)
        everything = as_rows({**expected, "domain": torch.full((len(rows),), number)}, number, 0, 0)
        assert set(chain.from_iterable(found)) == everything
        assert all(batch["history"][batch["domain"] == number].max() <= by + own.num_items for batch in batches)


def test_catalogue_is_the_domains_in_order() -> None:
    data = union()
    joined, (a, b) = data.catalogue, (d.catalogue for d in data.domains.values())
    assert (joined.name, joined.num_items) == ("a+b", 108)
    assert joined.titles == ["", *a.titles[1:], *b.titles[1:]]
    assert torch.equal(joined.text_embeddings, torch.cat([a.text_embeddings, b.text_embeddings[1:]]))
    assert torch.equal(joined.train_counts, torch.cat([a.train_counts, b.train_counts[1:]]))
    assert union("ba").catalogue.titles == joined.titles


def test_every_batch_mixes_the_domains_even_where_their_lengths_do_not_overlap() -> None:
    lengths = np.concatenate([np.random.default_rng(0).integers(1, 9, 1500), np.full(500, 50)])
    domains = np.repeat([0, 1], [1500, 500])
    sampler = UnionBatchSampler(lengths, domains, 64, seed=1, bucket_batches=8)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = [index.rows for index in sampler]
        assert sorted(chain.from_iterable(batches)) == list(range(2000))
        shares = [domains[rows].mean() for rows in batches if len(rows) == 64]
        assert min(shares) > 0.1
        assert max(shares) < 0.4
        short = [lengths[rows[domains[rows] == 0]] for rows in batches]
        assert np.mean([np.ptp(part) for part in short]) < 2.5  # lengths still stand together within a domain
        epochs.append(sorted(map(sorted, batches)))
    assert epochs[0] != epochs[1]


def test_even_batches_have_equal_positions_and_still_mix_the_domains() -> None:
    lengths = np.concatenate([np.minimum(np.random.default_rng(0).zipf(1.7, 6000), 50), np.full(500, 50)])
    domains = np.repeat([0, 1], [6000, 500])
    plain, even = (
        [index.rows for index in UnionBatchSampler(lengths, domains, 128, seed=1, even=even)] for even in (False, True)
    )
    assert len(plain) == len(even)
    for batches in (plain, even):
        assert sorted(chain.from_iterable(batches)) == list(range(6500))
        assert all(set(domains[rows]) == {0, 1} for rows in batches if len(rows) >= 50)
    # All but the smallest, which may be the last.
    positions = np.sort([[lengths[rows].sum() for rows in batches] for batches in (plain, even)])[:, 1:]
    assert positions[1].max() < 1.1 * positions[1].min()
    assert positions[0].max() > 2 * positions[0].min()


@pytest.mark.parametrize("settings", [{}, {"even_batches": False}])
def test_batches_are_even_where_those_of_the_domains_are(settings: dict) -> None:
    data = union(domain_settings=settings)
    assert data.train_dataloader().sampler.even is (settings == {})


def test_ranks_together_are_one_process_with_a_larger_batch() -> None:
    generator = np.random.default_rng(1)
    lengths, domains = generator.integers(1, 50, 207), generator.integers(0, 3, 207)

    def batches(size: int, **shard: int) -> list[list[int]]:
        sampler = UnionBatchSampler(lengths, domains, size, seed=2, **shard)
        sampler.set_epoch(3)
        return [sorted(index.rows.tolist()) for index in sampler]

    left, right = (batches(16, rank=rank, world_size=2) for rank in range(2))
    for one, two, whole in zip(left, right, batches(32), strict=True):
        assert len(one) - len(two) in (0, 1)
        assert sorted([*one, *two]) == whole


def test_batches_do_not_depend_on_workers_or_on_the_order_of_names() -> None:
    first, second, third = (
        list(union(names, num_workers=workers).train_dataloader())
        for names, workers in (("ab", 0), ("ba", 0), ("ab", 1))
    )
    for other in (second, third):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(first, other, strict=True) for key in a)


def test_validation_lists_are_those_of_the_domains() -> None:
    data = union(domain_settings={"max_eval_users": 40})
    batches = list(data.val_dataloader())
    shifts = {"a": (0, 0), "b": (60, 90)}
    expected = []
    for name, (by, users) in shifts.items():
        for batch in data.domains[name].val_dataloader():
            moved = {key: batch[key] + by * (batch[key] > 0) for key in ("history", "target", "candidates", "seen")}
            expected.append({**batch, **moved, "user": batch["user"] + users})
    assert sum(len(batch["user"]) for batch in batches) == 80
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) for key in batch)
        target = batch["candidates"].gather(1, batch["target_index"][:, None]).squeeze(1)
        assert torch.equal(target, batch["target"])


def test_masked_text_loses_words_once_and_never_all() -> None:
    texts = ["one two three four five six seven eight"] * 400 + ["alone"]
    masked = drop_words(texts, 0.25, numpy_generator(0, "test"))
    assert masked[-1] == "alone"
    words = texts[0].split()
    assert all([word for word in words if word in text.split()] == text.split() for text in masked[:-1])
    assert np.mean([len(text.split()) for text in masked[:-1]]) == pytest.approx(6.0, abs=0.15)
    data = union(word_drop=0.3)
    plain, dropped = data.catalogue.text_embeddings, data.masked_text
    assert dropped.shape == plain.shape
    assert not dropped[0].any()
    unlike = (dropped - plain).abs().amax(1) > 1e-6
    assert 0.2 < unlike[1:].float().mean() < 0.95
    assert torch.equal(dropped, union("ba", word_drop=0.3).masked_text)
    assert not torch.equal(dropped, union(word_drop=0.3, seed=2).masked_text)
    assert union(word_drop=0.0).masked_text is None


def test_bad_settings_are_named() -> None:
    for domains, settings, words in (
        ({}, {}, "at least one domain"),
        ({"x": domain("a")}, {}, "same name"),
        ({"a": domain("a", text_encoder=None)}, {}, "'a' has no text encoder"),
        ({"a": domain("a"), "b": domain("b", text_encoder=HashingTextEncoder(8))}, {}, "a, b must have the same text"),
        ({"a": domain("a")}, {"word_drop": 1.0}, "word_drop"),
    ):
        with pytest.raises(ConfigError, match=words):
            UnionDataModule(domains, **settings)
    with pytest.raises(ConfigError, match=r"call setup\(\) first"):
        _ = UnionDataModule({"a": domain("a")}).catalogue


def test_checkpoint_of_other_data_is_refused() -> None:
    data = union()
    data.load_state_dict(data.state_dict())
    with pytest.raises(CheckpointError, match=r"union of \['a'\], this is the union of \['a', 'b'\]"):
        data.load_state_dict(union("a").state_dict())
    with pytest.raises(CheckpointError, match="other data"):
        data.load_state_dict(union(domain_settings={"k_core": 5}).state_dict())
