"""Steps of k-means from sums over clients: equal to k-means on the union, and what one vector can change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.aggregation import spherical_kmeans
from lightning_sfubm.privacy.secure_kmeans import (
    MOMENTS_SENSITIVITY,
    ClusterSums,
    cluster_sensitivity,
    first_centroids,
    local_cluster_sums,
    local_moments,
    mean_and_spread,
)


def units(n: int, seed: int, dim: int = 8) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_step(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's step by a loop: sums (k, D) float64 and counts (k,)."""
    sums, counts = torch.zeros(centroids.shape).double(), torch.zeros(len(centroids), dtype=torch.float64)
    for vector in vectors:
        nearest = int((centroids @ vector).argmax())
        sums[nearest] += vector.double()
        counts[nearest] += 1
    return sums, counts


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3), st.integers(1, 6), st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_sums_and_counts_are_those_of_the_union(sizes: list[int], k: int, seed: int) -> None:
    vectors = [units(n, seed + i) for i, n in enumerate(sizes)]
    centroids = units(k, seed + 7)
    step = ClusterSums(**added([local_cluster_sums(v, centroids) for v in vectors]))
    sums, counts = plain_step(torch.cat(vectors), centroids)
    torch.testing.assert_close(step.sums, sums, rtol=0, atol=1e-12)
    assert torch.equal(step.counts, counts)
    present = [plain_step(v, centroids)[1] > 0 for v in vectors]
    assert torch.equal(step.contributors, torch.stack(present).sum(0).double())
    assert torch.equal(step.sufficient(3), step.contributors == 3)
    moved = step.centroids(centroids, torch.ones(8), stream())
    torch.testing.assert_close(moved[counts > 0], normalize(sums, dim=1)[counts > 0].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(k))


def test_empty_clusters_start_again_beside_the_largest() -> None:
    sums = ClusterSums(torch.eye(4, 8).double() * 9, torch.tensor([9.0, 0, 3, 0]).double(), torch.zeros(4))
    moved = sums.centroids(units(4, 1), torch.full((8,), 0.1), stream())
    assert torch.equal(moved[[0, 2]], torch.eye(4, 8)[[0, 2]])
    assert 0.9 < float(moved[1] @ moved[0]) < 1
    assert 0.9 < float(moved[3] @ moved[2]) < 1
    nothing = ClusterSums(torch.zeros(4, 8).double(), torch.zeros(4), torch.zeros(4))
    assert torch.equal(nothing.centroids(units(4, 1), torch.ones(8), stream()), units(4, 1))


def test_repeated_steps_end_where_plain_k_means_ends() -> None:
    centres = normalize(torch.eye(4, 8), dim=1)
    vectors = [normalize(centres.repeat_interleave(9, 0) + 0.2 * units(36, i), dim=1) for i in range(3)]
    expected, assigned = spherical_kmeans(torch.cat(vectors), 4, 25, seed=3)
    assert sorted(torch.bincount(assigned).tolist()) == [27] * 4
    centroids = normalize(centres + 0.3 * units(4, 9), dim=1)
    for _ in range(5):
        step = ClusterSums(**added([local_cluster_sums(v, centroids) for v in vectors]))
        centroids = step.centroids(centroids, torch.ones(8), stream())
    order = (expected @ centroids.T).argmax(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centroids[order], expected, rtol=0, atol=1e-5)


def test_the_first_centroids_lie_where_the_vectors_lie() -> None:
    narrow = normalize(torch.ones(8) + 0.05 * units(200, 1), dim=1)
    mean, spread = mean_and_spread(added([local_moments(narrow[:50]), local_moments(narrow[50:])]))
    torch.testing.assert_close(mean, narrow.mean(0))
    torch.testing.assert_close(spread, narrow.std(0, correction=0), rtol=1e-3, atol=1e-6)
    first = first_centroids(mean, spread, 5, stream())
    assert float((first @ normalize(mean, dim=0)).min()) > 0.98
    assert len(first.unique(dim=0)) == 5


def test_no_sum_rests_on_fewer_vectors_of_a_client_than_asked_for() -> None:
    centroids = torch.eye(3)
    lone, crowd = torch.eye(3)[[0, 0, 0, 0, 1]], torch.eye(3)[[0, 1, 1, 1, 1]]
    step = added([local_cluster_sums(v, centroids, 3) for v in (lone, crowd, crowd)])
    assert step["counts"].tolist() == [4, 8, 0]
    assert step["contributors"].tolist() == [1, 2, 0]
    assert step["sums"].diagonal().tolist() == [4.0, 8.0, 0.0]
    free = added([local_cluster_sums(v, centroids) for v in (lone, crowd, crowd)])
    assert free["counts"].tolist() == [6, 9, 0]
    assert free["contributors"].tolist() == [3, 3, 0]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_one_vector_changes_no_more_than_the_sensitivity(n: int, k: int, m: int, seed: int) -> None:
    vectors, centroids = units(n, seed), units(k, seed + 1)

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))

    for left_out in range(n):
        rest = torch.cat([vectors[:left_out], vectors[left_out + 1 :]])
        moved = distance(local_cluster_sums(vectors, centroids, m), local_cluster_sums(rest, centroids, m))
        assert moved <= cluster_sensitivity(m) + 1e-6
        assert distance(local_moments(vectors), local_moments(rest)) <= MOMENTS_SENSITIVITY + 1e-6


def test_the_sensitivity_is_reached() -> None:
    same = torch.eye(2)[[0, 0, 0]]
    one, other = local_cluster_sums(same, torch.eye(2), 3), local_cluster_sums(same[:2], torch.eye(2), 3)
    moved = math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))
    assert moved == pytest.approx(cluster_sensitivity(3))


def test_what_a_client_sends_has_the_size_of_the_centroids_alone() -> None:
    few, many = local_cluster_sums(units(2, 1), units(5, 2)), local_cluster_sums(units(500, 3), units(5, 2))
    assert {name: value.shape for name, value in few.items()} == {name: value.shape for name, value in many.items()}
    assert set(few) == {"sums", "counts", "contributors"}


def test_bad_settings_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_members = 0"):
        local_cluster_sums(units(20, 1), units(3, 5), min_members=0)
    with pytest.raises(MessageError, match=r"\(20, 8\) cannot be assigned to centroids of shape \(3, 4\)"):
        local_cluster_sums(units(20, 1), units(3, 5, 4))
