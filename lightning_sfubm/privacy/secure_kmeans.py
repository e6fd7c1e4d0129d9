"""The steps of federated k-means in which the server sees sums over all clients, and no vector.

    clients: count, sum and squares of their vectors   ->  server: first centroids, drawn around the mean of all
    clients: assign, per-cluster sums and counts       ->  server: the next centroids; repeated

What a client computes is a tensor of fixed size, whatever the number of its vectors, made for a secure sum. A step equals
Lloyd's step on the union of all vectors, to fixed-point precision, where no noise is added, every client has ``min_members``
vectors in each of its clusters, and no cluster is empty. Without noise a cluster that one client alone fills counts as empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.privacy.attacks import nearest_matches

#: L2 distance of :func:`local_moments` with and without one unit vector: 1 each for its sum, its squares and its count
MOMENTS_SENSITIVITY = 3.0**0.5


@dataclass(frozen=True)
class ClusterSums:
    """What the server learns of one step.

    Attributes:
        sums: (k, D) float64, sum of the vectors assigned to each cluster.
        counts: (k,) float64, how many there are; whole numbers unless noise was added.
        contributors: (k,) float64, how many clients have vectors in the sum.
    """

    sums: Tensor
    counts: Tensor
    contributors: Tensor

    @property
    def filled(self) -> Tensor:
        """(k,) bool, clusters with at least one vector."""
        return self.counts > 0.5

    def sufficient(self, clients: int) -> Tensor:
        """(k,) bool, clusters in which every one of ``clients`` has vectors."""
        return self.contributors > clients - 0.5

    def centroids(self, previous: Tensor, spread: Tensor, generator: torch.Generator) -> Tensor:
        """The next centroids.

        A cluster without vectors starts again beside the largest: the vector farthest from its centroid, which re-seeds it in
        :func:`~lightning_sfubm.federated.aggregation.spherical_kmeans`, is not known to a server that knows only sums.

        Args:
            previous: (k, D) unit rows.
            spread: (D,) standard deviation of all vectors by coordinate.
            generator: of the places where empty clusters start.

        Returns:
            (k, D) unit rows in the dtype of ``previous``.
        """
        filled = self.filled
        if not filled.any():
            return previous
        moved = torch.where(filled.unsqueeze(1), normalize(self.sums, dim=1).to(previous.dtype), previous)
        empty = (~filled).nonzero().flatten()
        beside = self.counts.argsort(descending=True, stable=True)[: int(filled.sum())]
        rows = moved[beside[torch.arange(len(empty)) % len(beside)]]
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        moved[empty] = normalize(rows + 0.5 * spread.to(rows.dtype) * noise, dim=1)
        return moved


def local_moments(vectors: Tensor) -> dict[str, Tensor]:
    """The client's part before the first step: float64 ``sum`` (D,), ``squares`` (D,) and ``count`` (1,) of its rows (N, D)."""
    rows = vectors.double()
    return {
        "sum": rows.sum(0),
        "squares": rows.square().sum(0),
        "count": torch.tensor([float(len(rows))], dtype=torch.float64),
    }


def mean_and_spread(moments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) by coordinate, float32, of the vectors that summed moments speak of."""
    count = float(moments["count"].clamp_min(1))
    mean = moments["sum"] / count
    spread = (moments["squares"] / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), spread.float()


def first_centroids(mean: Tensor, spread: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Centroids (k, D), unit rows drawn around the mean of all vectors with their spread by coordinate."""
    return normalize(mean + spread * torch.randn(num_clusters, len(mean), generator=generator), dim=1)


def local_cluster_sums(vectors: Tensor, centroids: Tensor, min_members: int = 1) -> dict[str, Tensor]:
    """The client's part of a step: assign, sum and count.

    Args:
        vectors: (N, D) unit rows of this client; N may be 0.
        centroids: (k, D) unit rows.
        min_members: m, at least 1. A client with fewer vectors than m in a cluster leaves all of them out of it, because a
            sum over one vector is that vector whatever hides the summands. 1 leaves nothing out.

    Returns:
        Float64 ``sums`` (k, D), ``counts`` (k,) and ``contributors`` (k,), ready for a secure sum.

    Raises:
        ConfigError: ``min_members`` is less than 1.
        MessageError: the vectors and centroids differ in dimension.
    """
    if min_members < 1:
        raise ConfigError(f"secure k-means: min_members = {min_members} must be at least 1")
    if vectors.dim() != 2 or centroids.dim() != 2 or vectors.shape[1] != centroids.shape[1]:
        raise MessageError(
            f"vectors of shape {tuple(vectors.shape)} cannot be assigned to centroids of shape {tuple(centroids.shape)}"
        )
    k = len(centroids)
    assigned = nearest_matches(vectors, centroids) if len(vectors) else torch.zeros(0, dtype=torch.long)
    sums = torch.zeros(k, vectors.shape[1], dtype=torch.float64).index_add_(0, assigned, vectors.double())
    counts = torch.bincount(assigned, minlength=k)
    enough = (counts >= min_members).double()
    return {"sums": sums * enough.unsqueeze(1), "counts": counts * enough, "contributors": enough}


def nearest_centroids(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of the cluster that each vector falls into: the client's view of itself within the federation.

    Args:
        vectors: (N, D) unit rows of this client.
        centroids: (k, D) unit rows.

    Returns:
        (N, D) rows of ``centroids``.
    """
    return centroids[nearest_matches(vectors, centroids)]


def filled_by_several(local: Mapping[str, Tensor], contributors: Tensor) -> dict[str, Tensor]:
    """The client's part of a step without clusters that fewer than two clients fill: such a sum is one client's own.

    Args:
        local: see :func:`local_cluster_sums`.
        contributors: (k,), those of all clients.
    """
    several = (contributors > 1.5).double()
    return {name: value * several.reshape(-1, *[1] * (value.dim() - 1)) for name, value in local.items()}


def cluster_sensitivity(min_members: int) -> float:
    """L2 distance of :func:`local_cluster_sums` with and without one vector.

    At most one cluster changes. Where its vectors become enough by the one, m of them enter at once: m in the sum, m in the
    count, 1 in the contributors.
    """
    return (2.0 * min_members**2 + 1.0) ** 0.5
