"""Neighbours by groups are those of the plain product, whatever the precision of the search (T16, T27)."""

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from lightning_sfubm.federated import neighbours
from lightning_sfubm.federated.neighbours import foreign_neighbours


def unit(n: int, seed: int, dim: int = 24) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def search(
    vectors: Tensor, sizes: Sequence[int], k: int, bf16: bool, groups: int = 40, members: int = 4
) -> tuple[Tensor, Tensor]:
    """The search with small groups, that few vectors suffice, and strips of 32 vectors."""
    small = {"_GROUPS": groups, "_MEMBERS": members, "_ROWS": 32, "has_fast_bf16": lambda device: bf16}
    with patch.multiple(neighbours, **small):
        return foreign_neighbours(vectors, sizes, k)


def similarities(vectors: Tensor, sizes: Sequence[int]) -> Tensor:
    """All cosines (N, N), -inf within a domain."""
    domain = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (vectors @ vectors.T).masked_fill(domain == domain.unsqueeze(1), -torch.inf)


def plain(vectors: Tensor, sizes: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """The k best of all cosines, with the row -1 where there are fewer than k."""
    values, rows = similarities(vectors, sizes).topk(k, dim=1)
    return values, rows.masked_fill(values.isinf(), -1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sizes", [(300, 1200), (400, 399, 401), (70, 1, 3, 700), (8, 5), (6,), (3, 900)])
def test_the_neighbours_are_those_of_the_plain_search(sizes: tuple[int, ...], bf16: bool) -> None:
    vectors = unit(sum(sizes), 1)
    k = min(5, sum(sizes))
    values, rows = search(vectors, sizes, k, bf16)
    expected = plain(vectors, sizes, k)
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(rows, expected[1])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    k=st.integers(1, 8),
    spread=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 100.0]),
    copies=st.integers(1, 9),
    seed=st.integers(0, 1000),
    bf16=st.booleans(),
    groups=st.integers(1, 60),
    members=st.integers(1, 20),
)
def test_any_domains_crowded_or_not(
    sizes: list[int], k: int, spread: float, copies: int, seed: int, bf16: bool, groups: int, members: int
) -> None:
    """Vectors closer to each other than bfloat16 can tell apart, and copies: ties may fall either way, cosines may not."""
    total = sum(sizes)
    k = min(k, total)
    few = normalize(unit(1, seed, 8) + spread * unit(total, seed + 1, 8), dim=1)[: -(-total // copies)]
    vectors = few.repeat(copies, 1)[:total]
    values, rows = search(vectors, sizes, k, bf16, groups, members)
    expected, _ = plain(vectors, sizes, k)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    found = rows >= 0
    assert torch.equal(found, expected.isfinite())
    own = similarities(vectors, sizes).gather(1, rows.clamp_min(0))  # -inf within the domain: no such row is accepted
    torch.testing.assert_close(own[found], values[found], atol=1e-6, rtol=0)
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in rows)


def test_rounding_that_goes_one_way_is_allowed_for() -> None:
    """Every entry is rounded down by .39 %, nearly as much as can be, and 5 best and 100 worse look alike in bfloat16."""
    dim = 4065
    signs = torch.ones(106, dim)
    for row, flips in enumerate([0] + [6] * 100 + [5] * 5):
        signs[row, torch.randperm(dim, generator=torch.Generator().manual_seed(row))[:flips]] = -1
    vectors = normalize(signs, dim=1)
    rough = (vectors[:1].bfloat16() @ vectors[1:].bfloat16().T).squeeze(0)
    assert len(rough.unique()) == 1
    assert float(vectors[0] @ vectors[-1] - rough[0]) > 2.0**-7
    _, rows = search(vectors, [1, 105], 5, bf16=True, members=1)
    assert set(rows[0].tolist()) == set(range(101, 106))


def test_low_precision_alone_would_have_been_wrong() -> None:
    vectors = torch.cat([unit(40, 5), normalize(unit(1, 3) + 2e-3 * unit(3000, 4), dim=1)])
    rough = (vectors[:40].bfloat16() @ vectors[40:].bfloat16().T).topk(5, dim=1).indices + 40
    expected = (vectors[:40] @ vectors[40:].T).topk(5, dim=1).values
    assert not torch.allclose((vectors[:40] @ vectors.T).gather(1, rough), expected, atol=1e-6, rtol=0)
    values, _ = search(vectors, [40, 3000], 5, bf16=True, members=16)
    torch.testing.assert_close(values[:40], expected, atol=1e-6, rtol=0)


def test_the_product_of_two_domains_is_computed_once() -> None:
    sizes = [500, 400, 300]
    with FlopCounterMode(display=False) as counter:
        search(unit(sum(sizes), 6), sizes, 5, bf16=False, groups=200)
    once = 2 * 24 * (500 * 400 + 500 * 300 + 400 * 300)
    assert once < counter.get_total_flops() < 1.5 * once
