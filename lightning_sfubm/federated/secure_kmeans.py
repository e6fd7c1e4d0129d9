"""K-means aggregation of item semantics in which no item vector leaves a client."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.federated.ledger import content_hash
from lightning_sfubm.federated.messages import Message, MessageSchema, TensorSchema, pack, unpack
from lightning_sfubm.federated.secure import Record, SecureAggregation
from lightning_sfubm.federated.server import SERVER
from lightning_sfubm.privacy.gaussian import gaussian_sigma
from lightning_sfubm.privacy.noise import NoiseStream
from lightning_sfubm.privacy.secagg.primitives import require_cryptography
from lightning_sfubm.privacy.secret import client_secret
from lightning_sfubm.privacy.secure_kmeans import (
    MOMENTS_SENSITIVITY,
    ClusterSums,
    cluster_sensitivity,
    filled_by_several,
    first_centroids,
    local_cluster_sums,
    local_moments,
    mean_and_spread,
    nearest_centroids,
)
from lightning_sfubm.seeds import derive_seed, torch_generator

#: (client, message): centroids sent down
Deliver = Callable[[str, Message], None]
#: whom the noise holds against: whoever knows the shares of several clients can subtract more than one share replaces, and a
#: server that unmasks a single upload finds the noise of one share in it
_ADVERSARY = (
    "the server, if it follows the secure aggregation, and any one other organisation, but not several together"
)
_SETTLED = 1e-6  # cosine distance that no centroid moves by any more


@dataclass(frozen=True)
class _Noise:
    """Noise of all clients together with standard deviation ``scale`` per unit of sensitivity, each adding its share."""

    scale: float
    shares: int
    secrets: Mapping[str, bytes]
    names: tuple[object, ...]
    centroids: str = ""  #: hash of those that the sums are about

    def __call__(self, client: str, step: int, tensors: dict[str, Tensor], sensitivity: float) -> dict[str, Tensor]:
        if not self.scale:
            return tensors
        noise = NoiseStream(
            self.secrets[client], "secure k-means noise", *self.names, self.centroids, step, content_hash(tensors)
        )
        std = self.scale * sensitivity / math.sqrt(self.shares)
        return {
            name: value + std * noise.normal(tuple(value.shape), value.dtype) for name, value in sorted(tensors.items())
        }


class SecureKMeans:
    """Cosine k-means over the items of all clients; each item's vector becomes its centroid, and no vector is sent.

    Clients assign their own vectors to the centroids they are sent; the server sees per-cluster sums and counts over all
    clients through secure aggregation (:mod:`lightning_sfubm.privacy.secure_aggregation`, extra ``secagg``). With
    two clients each can subtract its own sums from the total. Without noise the number of clients in each cluster is summed
    first, and a cluster that one alone fills is left out, because its sum is that client's own; with noise it is not. Without
    noise the sums are exact: where one item changes its
    cluster between two steps, the difference of the sums is that item's vector, whatever ``min_members`` is, and all clients
    are sent the centroids of every step. Only ``epsilon`` bounds that: with it the sums of all steps together are (epsilon,
    delta)-private for one item of one client, against a server that follows the secure aggregation and against any other
    single client, who knows its own share of the noise. Clients that put their shares together, or a server that deviates from
    the protocol, find less noise than that.

    Args:
        num_clusters: k; clusters in which not every client has ``min_members`` vectors are left out of the answer.
        min_members: fewer vectors of a client in a cluster stay out of its sums.
        iterations: Lloyd steps at most; fewer where centroids stop moving and no noise is added.
        seed: of the first centroids.
        epsilon: ``None`` = no noise.
        delta: of the guarantee.
        secret_dir: folder with one secret a client, made at first use, that keys its noise. ``None`` derives it from the
            run's seed: reproducible, and right for simulation only. The ledger says which.
        max_items: bound of a client's number of items, from which the fixed-point form follows.
        secure_aggregation: threshold and modulus of the secure sums; ``None`` for the defaults.

    Raises:
        ConfigError: a number is out of range, or the package ``cryptography`` is missing.
    """

    def __init__(
        self,
        num_clusters: int = 256,
        min_members: int = 5,
        iterations: int = 10,
        seed: int = 0,
        epsilon: float | None = None,
        delta: float = 1e-6,
        secret_dir: str | None = None,
        max_items: int = 1_000_000,
        secure_aggregation: SecureAggregation | None = None,
    ) -> None:
        require_cryptography()  # now, not after minutes of encoding
        if num_clusters < 1 or min_members < 1 or iterations < 1 or max_items < 1:
            raise ConfigError(
                f"SecureKMeans: num_clusters = {num_clusters}, min_members = {min_members}, iterations = {iterations} and "
                f"max_items = {max_items} must be at least 1"
            )
        self.num_clusters, self.min_members, self.iterations, self.seed = num_clusters, min_members, iterations, seed
        self.epsilon, self.delta, self.secret_dir, self.max_items = epsilon, delta, secret_dir, max_items
        self.secure = secure_aggregation if secure_aggregation is not None else SecureAggregation()
        self.secure.check_clients(2, self._clip)
        if epsilon is not None:
            gaussian_sigma(epsilon, delta)  # checks them

    def check_items(self, name: str, items: int) -> None:
        """Refuse a client with more items than the fixed-point form has room for, or too few to hide among.

        Raises:
            MessageError: there are more than ``max_items``.
            PrivacyError: there are fewer than ``min_members``, and no noise is added.
        """
        if items > self.max_items:
            raise MessageError(
                f"client '{name}' has {items} items, SecureKMeans.max_items = {self.max_items} admits no more"
            )
        if self.epsilon is None and items < self.min_members:
            raise PrivacyError(
                f"client '{name}' has {items} items, and SecureKMeans.min_members = {self.min_members}: a sum over so few "
                "gives them away to whoever takes part; leave the client out, lower min_members, or set epsilon"
            )

    def aggregate(self, uploads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`~lightning_sfubm.federated.aggregation.SemanticAggregator`; runs the protocol in this process."""
        if len(uploads) < 2:
            return {}
        return self.views(0, uploads, self.seed, 1, lambda *_: None, lambda *_: None)

    @property
    def secure_aggregation(self) -> SecureAggregation:
        """What was given by this name, or the defaults."""
        return self.secure

    @property
    def _clip(self) -> float:
        """Bound of an element of a client's sums, noise included."""
        return 4.0 * self.max_items

    def schema(self, dim: int) -> MessageSchema:
        """Of the messages with centroids that clients are sent."""
        rows = TensorSchema((None, dim), max_rows=self.num_clusters, unit_rows=True)
        return MessageSchema("semantics centroids", {"centroids": rows})

    def describe(self, exchanges: int) -> dict[str, Any]:
        """What protects the sums, for the ledger.

        Args:
            exchanges: how often the whole k-means runs.
        """
        stated: dict[str, Any] = {"secure aggregation": f"threshold {self.secure.threshold:g}"}
        if self.epsilon is not None:
            stated["differential privacy"] = {
                "mechanism": "analytic Gaussian, shares of the noise added by the clients",
                "epsilon": self.epsilon,
                "delta": self.delta,
                "neighbours": "one item of one organisation added or removed",
                "adversary": _ADVERSARY,
                "protects": "item",
                "noise_multiplier": self._scale(exchanges),
                "releases": self._releases(exchanges),
                "secret": "kept by the client" if self.secret_dir else "derived from the run's seed (simulation only)",
            }
        return stated

    def views(
        self,
        round: int,
        vectors: Mapping[str, Tensor],
        seed: int,
        exchanges: int,
        record: Record,
        deliver: Deliver,
        nonce: str = "",
    ) -> dict[str, Tensor]:
        """Run the protocol over all clients in this process, every message as bytes.

        Args:
            round: of the federation.
            vectors: (N_k, D) rows by client; at least two clients.
            seed: of the run, for noise without secrets of the clients' own.
            exchanges: how often the run will call this in all: the guarantee covers them together.
            record: called with every message of the secure sums.
            deliver: called with every message with centroids, before a client uses it.
            nonce: of the run, so that two runs with the same secrets share no noise: their difference would have none.

        Returns:
            (N_k, D) unit rows by client: the centroid nearest to each item among those on which every client has enough
            vectors, or the mean of all vectors where there is none.

        Raises:
            PrivacyError: fewer than two clients, or one with fewer vectors than ``min_members`` where no noise is added.
            MessageError: a client has more vectors than ``max_items``, or a message is not the server's of this round.
        """
        names = sorted(vectors)
        rows = {name: normalize(vectors[name].float(), dim=1) for name in names}
        for name in names:
            self.check_items(name, len(rows[name]))
        # All that changes what is released is in the names, and a client's own sums (content_hash): the same noise on two
        # different sums would give one away, and so would that of the others where one client changes or is not there.
        settings = (
            self.epsilon,
            self.delta,
            self.num_clusters,
            self.min_members,
            self.iterations,
            exchanges,
            self.seed,
        )
        # Whoever receives the total may be one of the clients, and knows its own share.
        shares = max(1, min(self.secure.survivors(len(names)), len(names) - 1))
        noise = _Noise(self._scale(exchanges), shares, self._secrets(names, seed), (nonce, *settings, round, *names))
        total = partial(self.secure.sum, round, clip=self._clip, record=record, prefix="semantics ")
        moments = total({n: noise(n, 0, local_moments(rows[n]), MOMENTS_SENSITIVITY) for n in names})
        mean, spread = mean_and_spread(moments)
        centroids = first_centroids(mean, spread, self.num_clusters, torch_generator(self.seed, "secure k-means"))
        sums, sensitivity = None, cluster_sensitivity(self.min_members)
        for step in range(1, self.iterations + 1):
            held = self._send(names, round, centroids, deliver)
            local = {name: local_cluster_sums(rows[name], held[name], self.min_members) for name in names}
            if not noise.scale:
                contributors = total({n: {"contributors": local[n]["contributors"]} for n in names})["contributors"]
                local = {name: filled_by_several(local[name], contributors) for name in names}
            noise = replace(noise, centroids=content_hash({"centroids": centroids}))
            sums = ClusterSums(**total({n: noise(n, step, local[n], sensitivity) for n in names}))
            moved = sums.centroids(centroids, spread, torch_generator(self.seed, "secure k-means", step))
            settled = float((1 - (moved * centroids).sum(1)).max()) < _SETTLED
            centroids = moved
            if settled and not noise.scale:
                break
        assert sums is not None
        kept = centroids[sums.sufficient(len(names))]
        held = self._send(names, round, kept if len(kept) else normalize(mean.unsqueeze(0), dim=1), deliver)
        return {name: nearest_centroids(rows[name], held[name]) for name in names}

    def _send(self, names: list[str], round: int, centroids: Tensor, deliver: Deliver) -> dict[str, Tensor]:
        """Centroids down; what each client reads of its message."""
        schema, held = self.schema(centroids.shape[1]), {}
        for name in names:
            message = pack(schema, SERVER, round, {"centroids": centroids})
            deliver(name, message)
            received = unpack(schema, message.payload)
            if (received.client, received.round) != (SERVER, round):
                raise MessageError(f"round {round}: centroids arrived that are not the server's of this round")
            held[name] = received.tensors["centroids"]
        return held

    def _releases(self, exchanges: int) -> int:
        return exchanges * (self.iterations + 1)

    def _scale(self, exchanges: int) -> float:
        """Standard deviation of the noise per unit of sensitivity: k Gaussian releases are one with sqrt(k) times it."""
        if self.epsilon is None:
            return 0.0
        return gaussian_sigma(self.epsilon, self.delta, math.sqrt(self._releases(exchanges)))

    def _secrets(self, names: list[str], seed: int) -> dict[str, bytes]:
        if self.epsilon is None:
            return {}
        if self.secret_dir is None:
            return {name: derive_seed(seed, "k-means secret", name).to_bytes(8, "big") for name in names}
        return {name: client_secret(self.secret_dir, name) for name in names}
