"""Server-side aggregation of item semantics (K uploads of unit vectors).

Semantic aggregators map ``{client: (N_k, D)}`` to ``{client: (N_k, D)}``, rows in the order of the upload. They keep no
state, treat clients in sorted order of name, so that the order of arrival cannot matter, and return ``{}`` where there
is nothing to exchange (one client, or aggregation switched off); a client without an answer uses its own vectors.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.neighbours import foreign_neighbours
from lightning_sfubm.seeds import torch_generator

_BLOCK = 2048  # rows at a time


@runtime_checkable
class SemanticAggregator(Protocol):
    """Turns the uploaded item vectors of all clients into each client's global view.

    Example:
        >>> KNNMix(k=5).aggregate({"a": xa, "b": xb})["a"].shape == xa.shape
        True
    """

    def aggregate(self, uploads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map uploads (N_k, D) by client to global views (N_k, D) by client."""
        ...


class NoAggregation:
    """The ablation: nothing comes back, each client keeps its own vectors as its global view."""

    def aggregate(self, uploads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return no view for any client."""
        return {}


class KNNMix:
    """Each item's vector becomes a similarity-weighted mean of its k nearest vectors of *other* domains [choice].

    The paper names "similarity-based replacement" without a formula. No vector of the item's own domain, and so never
    the item itself, enters its answer. Weights are ``softmax(cosine / tau)`` over the k neighbours.

    Args:
        k: neighbours, at least 5, so that an answer is a mixture. The nearest weighs most: where two silos sell the same item,
            the answer can come close to the other's upload of it, noise and all.
        tau: temperature of the weights.
    """

    def __init__(self, k: int = 5, tau: float = 0.07) -> None:
        if k < 5:
            raise ConfigError(
                f"KNNMix: k = {k}, but at least 5 neighbours are to be mixed, so that no answer is one silo's vector"
            )
        if tau <= 0:
            raise ConfigError(f"KNNMix: tau = {tau} must be positive")
        self.k, self.tau = k, tau

    def aggregate(self, uploads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`SemanticAggregator`. A client whose foreign pool has fewer than k vectors gets no answer."""
        names = sorted(uploads)
        if len(names) < 2:
            return {}
        vectors = torch.cat([uploads[name] for name in names])
        sizes = [len(uploads[name]) for name in names]
        cosines, rows = foreign_neighbours(vectors, sizes, self.k)
        answers = {}
        for name, own, near in zip(names, cosines.split(sizes), rows.split(sizes), strict=True):
            if len(vectors) - len(own) >= self.k:
                answers[name] = self._mix(vectors, own, near)
        return answers

    def _mix(self, vectors: Tensor, cosines: Tensor, rows: Tensor) -> Tensor:
        weights = torch.softmax(cosines / self.tau, dim=1)
        mixed = torch.empty(len(rows), vectors.shape[1])
        for start in range(0, len(rows), _BLOCK):
            block = slice(start, start + _BLOCK)
            mixed[block] = normalize(torch.einsum("nk,nkd->nd", weights[block], vectors[rows[block]]), dim=1)
        return mixed


class KMeans:
    """Cosine k-means over all uploads; each item's vector becomes its centroid (as FFMSR aggregates) [choice].

    Args:
        num_clusters: clusters wanted; never more than there are vectors.
        min_members: a cluster with fewer vectors of any one domain than this is merged into its nearest sufficient
            neighbour, so that no centroid rests on a handful of one silo's items. Where no cluster suffices, all vectors
            form one cluster.
        iterations: at most this many Lloyd steps; fewer where assignments stop changing.
        seed: of the k-means++ initialisation.
    """

    def __init__(self, num_clusters: int = 256, min_members: int = 5, iterations: int = 25, seed: int = 0) -> None:
        if num_clusters < 1 or min_members < 0 or iterations < 1:
            raise ConfigError(
                f"KMeans: num_clusters = {num_clusters}, min_members = {min_members}, iterations = {iterations}: "
                "clusters and iterations must be at least 1, min_members at least 0"
            )
        self.num_clusters, self.min_members, self.iterations, self.seed = num_clusters, min_members, iterations, seed

    def aggregate(self, uploads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`SemanticAggregator`. With one client there is no one to share with: no answer."""
        names = sorted(uploads)
        if len(names) < 2:
            return {}
        vectors = torch.cat([uploads[name] for name in names])
        domain = torch.cat([torch.full((len(uploads[name]),), i) for i, name in enumerate(names)])
        centroids, assigned = spherical_kmeans(vectors, self.num_clusters, self.iterations, self.seed)
        assigned = self._merge_small(vectors, centroids, assigned, domain, len(names))
        centroids, _ = _means(vectors, assigned, len(centroids))
        views = centroids[assigned].split([len(uploads[name]) for name in names])
        return dict(zip(names, (v.clone() for v in views), strict=True))

    def _merge_small(self, vectors: Tensor, centroids: Tensor, assigned: Tensor, domain: Tensor, num: int) -> Tensor:
        counts = torch.zeros(len(centroids), num, dtype=torch.long)
        counts.index_put_((assigned, domain), torch.ones_like(assigned), accumulate=True)
        sufficient = (counts >= self.min_members).all(dim=1)
        if not sufficient.any():
            return torch.zeros_like(assigned)
        target = torch.arange(len(centroids))
        similarity = centroids @ centroids.T
        similarity[:, ~sufficient] = -torch.inf
        target[~sufficient] = similarity[~sufficient].argmax(dim=1)
        return target[assigned]


def spherical_kmeans(vectors: Tensor, num_clusters: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cosine k-means with k-means++ seeding; an empty cluster is re-seeded with the vector farthest from its centroid.

    Args:
        vectors: (n, D) unit rows.
        num_clusters: capped at n.
        iterations: Lloyd steps at most.
        seed: of the initialisation.

    Returns:
        Centroids (k, D), unit rows, and assignments (n,).
    """
    generator = torch_generator(seed, "kmeans")
    k = min(num_clusters, len(vectors))
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distance = 1 - vectors @ vectors[chosen[0]]
    for _ in range(k - 1):
        weights = distance.clamp_min(0) + 1e-12
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - vectors @ vectors[chosen[-1]])
    centroids = vectors[chosen].clone()
    assigned = torch.full((len(vectors),), -1, dtype=torch.long)
    for _ in range(iterations):
        similarity, new = _nearest(vectors, centroids)
        if torch.equal(new, assigned):
            break
        centroids, counts = _means(vectors, new, k)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            farthest = similarity.argsort(stable=True)[: len(empty)]
            centroids[empty], new[farthest] = vectors[farthest], empty
        assigned = new
    return centroids, assigned


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    best = [(vectors[i : i + _BLOCK] @ centroids.T).max(dim=1) for i in range(0, len(vectors), _BLOCK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _means(vectors: Tensor, assigned: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(k, vectors.shape[1]).index_add_(0, assigned, vectors)
    return normalize(sums, dim=1), torch.bincount(assigned, minlength=k)
