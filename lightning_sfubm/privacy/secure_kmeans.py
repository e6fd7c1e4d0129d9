"""One step of federated k-means in which the server sees per-cluster sums and counts over all clients, and no vector.

Each client assigns its own vectors to the centroids it was sent; sums, counts and the number of contributing clients go
through :func:`~lightning_sfubm.privacy.secure_aggregation.secure_sum`. The step equals Lloyd's step on the union of all
vectors, as :class:`~lightning_sfubm.federated.aggregation.KMeans` takes it, to fixed-point precision, except that a
cluster without vectors keeps its centroid: the vector farthest from its centroid, which re-seeds it there, is not known to
a server that knows only sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.privacy.attacks import nearest_matches
from lightning_sfubm.privacy.secure_aggregation import SecAggSettings, secure_sum


@dataclass(frozen=True)
class ClusterSums:
    """What the server learns of one step.

    Attributes:
        sums: (k, D) float64, sum of the vectors assigned to each cluster.
        counts: (k,) int64, how many there are.
        contributors: (k,) int64, how many clients have vectors in the sum. A cluster on which every domain has enough
            vectors is one with ``contributors == len(clients)``.
        clients: names of the clients in the sums.
    """

    sums: Tensor
    counts: Tensor
    contributors: Tensor
    clients: tuple[str, ...]

    def centroids(self, previous: Tensor) -> Tensor:
        """The next centroids (k, D), unit rows in the dtype of ``previous``, which stays where a cluster is empty."""
        moved = normalize(self.sums, dim=1).to(previous.dtype)
        return torch.where((self.counts > 0).unsqueeze(1), moved, previous)


def local_cluster_sums(vectors: Tensor, centroids: Tensor, min_members: int = 1) -> dict[str, Tensor]:
    """The client's part: assign, sum and count.

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


def secure_cluster_sums(
    vectors: Mapping[str, Tensor],
    centroids: Tensor,
    settings: SecAggSettings,
    *,
    min_members: int = 1,
    dropped: Mapping[str, str] | None = None,
    round: int = 0,
) -> ClusterSums:
    """Run one step over all clients in this process; ``.centroids(previous)`` of the result is the k-means iteration.

    Args:
        vectors: (N_k, D) unit rows by client.
        centroids: (k, D) unit rows, the same for all clients.
        settings: of the secure sum; ``clip`` must reach the largest number of vectors of a client.
        min_members: see :func:`local_cluster_sums`.
        dropped: see :func:`~lightning_sfubm.privacy.secure_aggregation.secure_sum`.
        round: a number for this step.

    Returns:
        Sums and counts over the clients that sent their input.

    Raises:
        PrivacyError: fewer clients than the threshold are left at a step.
        MessageError: the dimensions differ, or a client has more vectors than ``clip``.
    """
    local = {name: local_cluster_sums(vectors[name], centroids, min_members) for name in sorted(vectors)}
    total = secure_sum(local, settings, dropped=dropped, round=round)
    return ClusterSums(
        total.tensors["sums"],
        total.tensors["counts"].round().long(),
        total.tensors["contributors"].round().long(),
        total.clients,
    )
