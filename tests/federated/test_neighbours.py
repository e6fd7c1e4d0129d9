"""Neighbours in blocks are those of the plain product, whatever the precision of the search (T16)."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.federated import neighbours
from lightning_sfubm.federated.aggregation import KNNMix
from lightning_sfubm.federated.neighbours import nearest


def unit(n: int, seed: int, dim: int = 24) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize(("n", "m"), [(300, 5000), (70, 4999), (1, 700), (65, 8)])
def test_blocked_search_is_the_plain_one(n: int, m: int, low_precision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_LARGE", 1 << 16)  # every pool is large
    monkeypatch.setattr(neighbours, "_ROWS", 128)
    monkeypatch.setattr(neighbours, "_GROUP", 16)
    queries, pool = unit(n, 1), unit(m, 2)
    values, rows = nearest(queries, pool, 5, low_precision)
    expected = (queries @ pool.T).topk(5, dim=1)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(rows, expected.indices)


def test_close_calls_that_low_precision_cannot_settle_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of vectors closer to each other than bfloat16 can tell apart."""
    monkeypatch.setattr(neighbours, "_GROUP", 16)
    centre = unit(1, 3)
    pool = normalize(centre + 2e-3 * unit(3000, 4), dim=1)
    queries = normalize(centre + 0.5 * unit(40, 5), dim=1)
    values, _ = nearest(queries, pool, 5, low_precision=True)
    expected = (queries @ pool.T).topk(5, dim=1).values
    rough = (queries.bfloat16() @ pool.bfloat16().T).topk(neighbours._SHORTLIST, dim=1).indices
    blind = (queries @ pool.T).gather(1, rough).topk(5, dim=1).values
    assert not torch.allclose(blind, expected, atol=1e-6, rtol=0)  # the short list alone would have been wrong
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_identical_vectors_are_all_the_same_neighbour() -> None:
    pool = unit(1, 6).repeat(4000, 1)
    values, rows = nearest(unit(3, 7), pool, 5, low_precision=True)
    assert len(set(rows[0].tolist())) == 5
    torch.testing.assert_close(values, (unit(3, 7) @ pool[:5].T))


def test_a_large_mix_is_that_of_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = {"a": unit(400, 8), "b": unit(900, 9), "c": unit(500, 10)}
    plain = KNNMix().aggregate(uploads)
    monkeypatch.setattr(neighbours, "_LARGE", 1 << 14)
    monkeypatch.setattr(neighbours, "_GROUP", 16)
    monkeypatch.setattr(neighbours, "has_fast_bf16", lambda device: True)
    for name, view in KNNMix().aggregate(uploads).items():
        torch.testing.assert_close(view, plain[name])
