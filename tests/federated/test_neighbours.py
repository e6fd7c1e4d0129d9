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


def rounded_down(flips: Sequence[int]) -> Tensor:
    """Vectors whose entries bfloat16 all rounds down by .39 %, nearly as much as it can; signs flipped at
    random in each."""
    signs = torch.ones(len(flips), 4065)
    for row, number in enumerate(flips):
        signs[row, torch.randperm(4065, generator=torch.Generator().manual_seed(row))[:number]] = -1
    return normalize(signs, dim=1)


def test_five_best_that_look_like_a_hundred_worse_are_found() -> None:
    vectors = rounded_down([0] + [6] * 100 + [5] * 5)
    rough = (vectors[:1].bfloat16() @ vectors[1:].bfloat16().T).squeeze(0)
    assert len(rough.unique()) == 1
    _, rows = search(vectors, [1, 105], 5, bf16=True, members=1)
    assert set(rows[0].tolist()) == set(range(101, 106))


@pytest.mark.parametrize("number", [40, 37])
def test_the_error_covers_rounding_that_goes_one_way(number: int) -> None:
    vectors = rounded_down(range(number))
    groups, _, bounds = neighbours._grouped([1, number - 1], 4)
    with patch.object(neighbours, "has_fast_bf16", lambda device: True):
        maxima, error = neighbours._maxima(vectors, groups, bounds)
    exact = (vectors[0] @ vectors.T)[groups[:, 1:]].amax(dim=0)
    moved = (maxima[0, 0, 1:].float() - exact).abs()
    assert (moved <= error / 2 + 2.0**-8 * exact).all()
    assert float(moved.max()) > error / 2  # the bound is nearly reached


def test_a_group_one_step_of_bfloat16_below_is_near() -> None:
    """Two similarities closer than any error may be rounded apart, to neighbouring numbers."""
    steps = torch.tensor([-torch.inf, 240, 239, 240, 238, 100]) / 256
    near = neighbours._near(steps.bfloat16().view(1, 1, 6).expand(1, 6, 6), 0.0, torch.ones(1, 6, dtype=torch.bool), 2)
    assert near[:, 0, 0].tolist() == [False, True, True, True, False, False]


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
