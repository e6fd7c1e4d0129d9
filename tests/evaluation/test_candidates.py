"""Candidate lists: what every list must be, uniformity, storage."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.evaluation.candidates import (
    CandidateLists,
    CandidateSampler,
    stored_candidates,
    title_groups,
)
from lightning_sfubm.evaluation.parsing import normalise_title
from lightning_sfubm.seeds import numpy_generator


def sampler_of(histories: list[list[int]], targets: list[int], titles: list[str]) -> CandidateSampler:
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    items = np.array(list(chain.from_iterable(histories)), dtype=np.int32)
    return CandidateSampler("shop", np.array(targets), items, starts, ends, title_groups(["", *titles]))


def check(lists: CandidateLists, histories: list[list[int]], targets: list[int], titles: list[str], size: int) -> None:
    assert lists.candidates.shape == (len(targets), size)
    for row, place, history, target in zip(lists.candidates, lists.target_index, histories, targets, strict=True):
        assert row[place] == target
        negatives = np.delete(row, place)
        assert target not in negatives
        assert not set(negatives) & set(history)
        assert len({normalise_title(titles[item - 1]) for item in row}) == size
        assert row.min() >= 1


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_list_is_legal(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(8, 40))
    titles = [f"Title {data.draw(st.integers(0, num_items))}" for _ in range(num_items)]
    rows = data.draw(st.integers(1, 6))
    histories = [data.draw(st.lists(st.integers(1, num_items), min_size=1, max_size=30)) for _ in range(rows)]
    targets = [history[-1] for history in histories]
    left = [
        {titles[item] for item in range(num_items) if item + 1 not in history} - {titles[target - 1]}
        for history, target in zip(histories, targets, strict=True)
    ]
    size = data.draw(st.integers(2, 8))
    sampler = sampler_of(histories, targets, titles)
    if min(map(len, left)) >= size - 1:
        check(sampler.draw(size, numpy_generator(1, "test")), histories, targets, titles, size)
    else:
        with pytest.raises(DataError, match="lower num_candidates"):
            sampler.draw(size, numpy_generator(1, "test"))


def test_a_row_that_leaves_exactly_enough_is_filled() -> None:
    titles = [f"t{item}" for item in range(200)]
    histories = [list(range(1, 182))]
    lists = sampler_of(histories, [181], titles).draw(20, numpy_generator(0, "tight"))
    check(lists, histories, [181], titles, 20)
    assert set(lists.candidates[0]) == set(range(181, 201))


def test_negatives_and_places_are_uniform() -> None:
    rows, num_items, size = 6000, 30, 5
    histories = [[1, 2, 3]] * rows
    lists = sampler_of(histories, [3] * rows, [f"t{item}" for item in range(num_items)]).draw(
        size, numpy_generator(0, "u")
    )
    counts = np.bincount(lists.candidates.ravel(), minlength=num_items + 1)[4:]
    expected = rows * (size - 1) / (num_items - 3)
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))
    places = np.bincount(lists.target_index, minlength=size)
    assert np.all(np.abs(places - rows / size) < 5 * np.sqrt(rows / size))


def test_too_few_distinct_titles_is_one_clear_error() -> None:
    for titles in ([f"t{item}" for item in range(19)], ["the same"] * 50):
        with pytest.raises(DataError, match=r"domain 'shop' has \d+ items with distinct titles.*20 candidates"):
            sampler_of([[1]], [1], titles).draw(20, numpy_generator(0))
    with pytest.raises(ConfigError, match="at least 2"):
        sampler_of([[1]], [1], ["a", "b"]).draw(1, numpy_generator(0))


def test_titles_are_normalised() -> None:
    assert normalise_title("  The\tMATRIX ﬁlm ") == normalise_title("the matrix film")
    curly, plain = "Schindler\u2019s List \u2013 1993", "schindler's list - 1993"
    assert title_groups(["", curly, plain, "Another"]).tolist() == [-1, 0, 0, 1]  # an answer could not tell them apart
    assert title_groups(["", "A b", "a  B", "c"]).tolist() == [-1, 0, 0, 1]


def test_no_rows() -> None:
    lists = sampler_of([], [], [f"t{item}" for item in range(30)]).draw(20, numpy_generator(0))
    assert lists.candidates.shape == (0, 20)


def store(
    folder: Path, seed: int = 1, split: str = "test", fingerprint: str = "f" * 64, calls: list | None = None
) -> CandidateLists:
    titles = [f"t{item}" for item in range(60)]

    def sampler() -> CandidateSampler:
        if calls is not None:
            calls.append(seed)
        return sampler_of([[1, 2], [5, 6, 7]], [2, 7], titles)

    return stored_candidates(
        folder, sampler, rows=2, fingerprint=fingerprint, split=split, seed=seed, num_candidates=20
    )


def test_stored_once_and_named_by_data_split_and_seed(tmp_path: Path) -> None:
    calls: list[int] = []
    first = store(tmp_path, calls=calls)
    assert store(tmp_path, calls=calls).sha256 == first.sha256
    assert calls == [1]
    others = [store(tmp_path, seed=2), store(tmp_path, split="val"), store(tmp_path, fingerprint="e" * 64)]
    assert len({lists.sha256 for lists in (first, *others)}) == 4
    assert len(list(tmp_path.iterdir())) == 4
    assert store(tmp_path / "elsewhere").sha256 == first.sha256  # drawn again, the same


def test_the_hash_covers_where_the_target_stands(tmp_path: Path) -> None:
    lists = store(tmp_path)
    moved = CandidateLists(lists.candidates, (lists.target_index + 1) % 20)
    assert moved.sha256 != lists.sha256
    assert CandidateLists(lists.candidates.copy(), lists.target_index.copy()).sha256 == lists.sha256
    path = next(tmp_path.iterdir())
    tensors = {"candidates": lists.candidates, "target_index": moved.target_index}
    path.write_bytes(save(tensors, {"sha256": lists.sha256}))
    with pytest.raises(DataError, match="sha256"):
        store(tmp_path)


def test_tampered_or_torn_file_is_refused(tmp_path: Path) -> None:
    store(tmp_path)
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(DataError, match="sha256"):
        store(tmp_path)
    path.write_bytes(whole[:30])
    with pytest.raises(DataError, match="damaged candidate lists"):
        store(tmp_path)
