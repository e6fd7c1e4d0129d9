"""Server-side aggregation (T16, T27)."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated import neighbours
from lightning_sfubm.federated.aggregation import (
    KMeans,
    KNNMix,
    NoAggregation,
    SemanticAggregator,
    spherical_kmeans,
)


def vectors(n: int, seed: int, dim: int = 8) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("aggregator", [KNNMix(), KMeans(num_clusters=4), NoAggregation()])
def test_contract(aggregator: SemanticAggregator) -> None:
    assert isinstance(aggregator, SemanticAggregator)
    uploads = {"b": vectors(30, 1), "a": vectors(20, 2), "c": vectors(25, 3)}
    first = aggregator.aggregate(uploads)
    second = aggregator.aggregate({k: uploads[k] for k in ("c", "a", "b")})
    for name, view in first.items():
        assert view.shape == uploads[name].shape
        assert torch.equal(view, second[name])
        torch.testing.assert_close(view.norm(dim=1), torch.ones(len(view)))
    assert aggregator.aggregate({"a": uploads["a"]}) == {}


def test_knn_mix_uses_only_foreign_vectors() -> None:
    own, foreign = vectors(40, 1), vectors(30, 2)
    before = KNNMix(k=5).aggregate({"a": own, "b": foreign})["a"]
    shuffled = own[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    order = KNNMix(k=5).aggregate({"a": shuffled, "b": foreign})["a"]
    assert {tuple(r) for r in (before * 1e4).round().int().tolist()} == {
        tuple(r) for r in (order * 1e4).round().int().tolist()
    }
    # The answer for an item lies in the cone of its 5 nearest foreign vectors, with softmax weights.
    similarity, neighbours = (own @ foreign.T).topk(5, dim=1)
    expected = normalize((torch.softmax(similarity / 0.07, 1).unsqueeze(-1) * foreign[neighbours]).sum(1), dim=1)
    torch.testing.assert_close(before, expected)
    # One more item in the own domain, identical to the first, changes nothing for the others.
    grown = KNNMix(k=5).aggregate({"a": torch.cat([own, own[:1]]), "b": foreign})["a"]
    torch.testing.assert_close(grown[:40], before)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4), k=st.integers(5, 9), bf16=st.booleans(), data=st.data()
)
def test_knn_mix_is_that_of_the_plain_search(sizes: list[int], k: int, bf16: bool, data: st.DataObject) -> None:
    names = data.draw(st.permutations("abcd"[: len(sizes)]))
    uploads = {name: vectors(size, seed) for seed, (name, size) in enumerate(zip(names, sizes, strict=True))}
    with patch.multiple(neighbours, _MEMBERS=3, has_fast_bf16=lambda device: bf16):
        views = KNNMix(k).aggregate(uploads)
    for name, own in uploads.items():
        foreign = torch.cat([uploads[other] for other in names if other != name])
        assert (name in views) == (len(foreign) >= k)
        if name in views:
            similarity, rows = (own @ foreign.T).topk(k, dim=1)
            weights = torch.softmax(similarity / 0.07, dim=1)
            expected = normalize(torch.einsum("nk,nkd->nd", weights, foreign[rows]), dim=1)
            torch.testing.assert_close(views[name], expected)


def test_knn_mix_of_three_silos_never_uses_the_own_domain() -> None:
    """Each silo's vectors lie along an axis of their own, so that any of its own would be its nearest."""
    axes = torch.eye(3, 8).repeat_interleave(30, 0)
    uploads = dict(zip("abc", normalize(axes + 0.1 * vectors(90, 4), dim=1).split(30), strict=True))
    for axis, view in enumerate(KNNMix().aggregate(uploads).values()):
        assert float(view[:, axis].abs().max()) < 0.5


def test_knn_mix_with_one_silo_smaller_than_k() -> None:
    uploads = {"a": vectors(30, 1), "b": vectors(3, 2), "c": vectors(4, 3)}
    views = KNNMix(k=5).aggregate(uploads)
    assert set(views) == {"a", "b", "c"}
    assert set(KNNMix(k=8).aggregate(uploads)) == {"b", "c"}  # a's foreign pool has 7
    similarity, rows = (uploads["a"] @ torch.cat([uploads["b"], uploads["c"]]).T).topk(5, dim=1)
    weights = torch.softmax(similarity / 0.07, dim=1).unsqueeze(-1)
    mixed = (weights * torch.cat([uploads["b"], uploads["c"]])[rows]).sum(dim=1)
    torch.testing.assert_close(views["a"], normalize(mixed, dim=1))


def test_knn_mix_with_a_foreign_pool_under_k_gives_no_answer() -> None:
    assert set(KNNMix(k=5).aggregate({"a": vectors(9, 1), "b": vectors(4, 2)})) == {"b"}


@pytest.mark.parametrize("bad", [{"k": 4}, {"tau": 0.0}])
def test_knn_mix_refuses(bad: dict) -> None:
    with pytest.raises(ConfigError):
        KNNMix(**bad)


def test_kmeans_survives_identical_points_and_k_beyond_n() -> None:
    same = normalize(torch.ones(6, 4), dim=1)
    for k in (1, 3, 50):
        views = KMeans(num_clusters=k, min_members=0).aggregate({"a": same, "b": same})
        torch.testing.assert_close(views["a"], same)
        assert torch.isfinite(views["b"]).all()


def test_kmeans_reseeds_empty_clusters_and_finds_planted_ones() -> None:
    centres = normalize(torch.eye(4, 8), dim=1)
    points = normalize(centres.repeat_interleave(10, 0) + 0.05 * vectors(40, 5), dim=1)
    centroids, assigned = spherical_kmeans(points, 4, 25, seed=3)
    assert torch.isfinite(centroids).all()
    assert sorted(torch.bincount(assigned, minlength=4).tolist()) == [10, 10, 10, 10]


def test_kmeans_merges_clusters_with_too_few_members_of_a_domain() -> None:
    # Domain b has two lone items far from everything: their centroid may not rest on them alone.
    crowd = normalize(torch.tensor([[1.0, 0, 0, 0]]).repeat(20, 1) + 0.01 * vectors(20, 1, 4), dim=1)
    lone = normalize(torch.tensor([[0.0, 0, 0, 1.0]]).repeat(2, 1), dim=1)
    uploads = {"a": crowd, "b": torch.cat([crowd, lone])}
    merged = KMeans(num_clusters=2, min_members=5).aggregate(uploads)["b"]
    free = KMeans(num_clusters=2, min_members=0).aggregate(uploads)["b"]
    assert float((free[-1] * lone[0]).sum()) > 0.99
    assert float((merged[-1] * lone[0]).sum()) < 0.5


@pytest.mark.parametrize(("of_b", "kept"), [(4, False), (5, True)])
def test_a_cluster_of_kmeans_needs_enough_members_of_every_domain(of_b: int, kept: bool) -> None:
    crowd, group = (
        normalize(torch.eye(4)[place].repeat(n, 1) + 0.01 * vectors(n, 1, 4)) for place, n in ((0, 20), (3, 8))
    )
    uploads = {"a": torch.cat([crowd, group]), "b": torch.cat([crowd, group[:of_b]])}
    views = KMeans(num_clusters=2, min_members=5).aggregate(uploads)
    for name in "ab":  # a's eight would suffice alone
        assert (float(views[name][-1] @ group[0]) > 0.9) == kept
