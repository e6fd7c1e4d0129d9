"""Federated k-means under secure sums equals k-means on the union of all vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.federated.aggregation import spherical_kmeans
from lightning_sfubm.privacy.secure_aggregation import SecAggSettings
from lightning_sfubm.privacy.secure_kmeans import local_cluster_sums, secure_cluster_sums

AGREED = SecAggSettings(3, clip=100.0)


def units(n: int, seed: int, dim: int = 8) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_step(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's step by a loop: sums (k, D) float64 and counts (k,)."""
    sums, counts = torch.zeros(centroids.shape).double(), torch.zeros(len(centroids), dtype=torch.long)
    for vector in vectors:
        nearest = int((centroids @ vector).argmax())
        sums[nearest] += vector.double()
        counts[nearest] += 1
    return sums, counts


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3), st.integers(1, 6), st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_sums_and_counts_are_those_of_the_union(sizes: list[int], k: int, seed: int) -> None:
    vectors = {name: units(n, seed + i) for i, (name, n) in enumerate(zip("abc", sizes, strict=True))}
    centroids = units(k, seed + 7)
    step = secure_cluster_sums(vectors, centroids, AGREED)
    sums, counts = plain_step(torch.cat(list(vectors.values())), centroids)
    torch.testing.assert_close(step.sums, sums, rtol=0, atol=1.5 * 2.0**-24 + 1e-12)
    assert torch.equal(step.counts, counts)
    present = [plain_step(v, centroids)[1] > 0 for v in vectors.values()]
    assert torch.equal(step.contributors, torch.stack(present).sum(0))
    moved = step.centroids(centroids)
    assert torch.equal(moved[counts == 0], centroids[counts == 0])
    torch.testing.assert_close(moved[counts > 0], normalize(sums, dim=1)[counts > 0].float(), rtol=0, atol=1e-5)


def test_repeated_steps_end_where_plain_k_means_ends() -> None:
    centres = normalize(torch.eye(4, 8), dim=1)
    vectors = {
        name: normalize(centres.repeat_interleave(9, 0) + 0.2 * units(36, i), dim=1) for i, name in enumerate("abc")
    }
    union = torch.cat(list(vectors.values()))
    expected, assigned = spherical_kmeans(union, 4, 25, seed=3)
    assert sorted(torch.bincount(assigned).tolist()) == [27] * 4
    centroids = normalize(centres + 0.3 * units(4, 9), dim=1)
    for number in range(5):
        centroids = secure_cluster_sums(vectors, centroids, AGREED, round=number).centroids(centroids)
    order = (expected @ centroids.T).argmax(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centroids[order], expected, rtol=0, atol=1e-5)


def test_dropped_clients_are_left_out() -> None:
    vectors = {name: units(20, i) for i, name in enumerate("abc")}
    centroids = units(3, 5)
    step = secure_cluster_sums(vectors, centroids, AGREED, dropped={"b": "mask_input"})
    sums, counts = plain_step(torch.cat([vectors["a"], vectors["c"]]), centroids)
    assert step.clients == ("a", "c")
    assert torch.equal(step.counts, counts)
    torch.testing.assert_close(step.sums, sums, rtol=0, atol=2.0**-24 + 1e-12)
    with pytest.raises(PrivacyError, match="threshold"):
        secure_cluster_sums(vectors, centroids, AGREED, dropped={"b": "mask_input", "c": "share_keys"})


def test_no_sum_rests_on_fewer_vectors_of_a_client_than_asked_for() -> None:
    centroids = torch.eye(3)
    lone, crowd = torch.eye(3)[[0, 0, 0, 0, 1]], torch.eye(3)[[0, 1, 1, 1, 1]]
    step = secure_cluster_sums({"a": lone, "b": crowd, "c": crowd}, centroids, AGREED, min_members=3)
    assert step.counts.tolist() == [4, 8, 0]
    assert step.contributors.tolist() == [1, 2, 0]
    assert step.sums.diagonal().tolist() == [4.0, 8.0, 0.0]
    free = secure_cluster_sums({"a": lone, "b": crowd, "c": crowd}, centroids, AGREED)
    assert free.counts.tolist() == [6, 9, 0]
    assert free.contributors.tolist() == [3, 3, 0]


def test_what_a_client_sends_has_the_size_of_the_centroids_alone() -> None:
    few, many = local_cluster_sums(units(2, 1), units(5, 2)), local_cluster_sums(units(500, 3), units(5, 2))
    assert {name: value.shape for name, value in few.items()} == {name: value.shape for name, value in many.items()}
    assert set(few) == {"sums", "counts", "contributors"}


def test_bad_settings_and_shapes_are_refused() -> None:
    vectors = {name: units(20, i) for i, name in enumerate("abc")}
    with pytest.raises(ConfigError, match="min_members = 0"):
        secure_cluster_sums(vectors, units(3, 5), AGREED, min_members=0)
    with pytest.raises(MessageError, match=r"\(20, 8\) cannot be assigned to centroids of shape \(3, 4\)"):
        secure_cluster_sums(vectors, units(3, 5, 4), AGREED)
    with pytest.raises(MessageError, match="'counts' holds a value beyond the clip range"):
        secure_cluster_sums(vectors, units(1, 5), SecAggSettings(3, clip=19.0))
