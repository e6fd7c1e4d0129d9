"""Server-side aggregation (T16, T27)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.aggregation import (
    KMeans,
    KNNMix,
    NoAggregation,
    SemanticAggregator,
    federated_average,
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


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value), "b": torch.full((3,), -value)}


def test_fedavg_is_the_weighted_mean_and_one_client_is_identity() -> None:
    mixed = federated_average({"a": state(1.0), "b": state(4.0)}, {"a": 3, "b": 1})
    torch.testing.assert_close(mixed["w"], torch.full((2, 3), 1.75))
    alone = federated_average({"a": state(0.1)}, {"a": 17})
    assert torch.equal(alone["w"], state(0.1)["w"])


@given(st.permutations(["a", "b", "c", "d"]), st.lists(st.floats(0, 100), min_size=4, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_fedavg_does_not_depend_on_order_and_stays_within_the_range(order: list[str], weights: list[float]) -> None:
    states = {n: state(float(i)) for i, n in enumerate("abcd")}
    by_name = dict(zip("abcd", weights, strict=True))
    first = federated_average(states, by_name)
    second = federated_average({n: states[n] for n in order}, by_name)
    assert first.keys() == second.keys()
    if sum(weights) == 0:
        assert first == {}
        return
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert 0 <= float(first["w"].min()) <= float(first["w"].max()) <= 3


def test_fedavg_ignores_a_client_without_examples() -> None:
    mixed = federated_average({"a": state(1.0), "b": state(9.0)}, {"a": 5, "b": 0})
    assert torch.equal(mixed["w"], state(1.0)["w"])


@pytest.mark.parametrize(
    ("bad", "weight"),
    [
        ({"w": torch.full((2, 3), float("nan")), "b": torch.zeros(3)}, 1),
        ({"w": torch.zeros(3, 2), "b": torch.zeros(3)}, 1),
        ({"w": torch.zeros(2, 3)}, 1),
        (state(1.0), -1),
    ],
)
def test_fedavg_refuses_bad_updates(bad: dict, weight: float) -> None:
    with pytest.raises(MessageError, match="'z'"):
        federated_average({"a": state(1.0), "z": bad}, {"a": 1, "z": weight})
