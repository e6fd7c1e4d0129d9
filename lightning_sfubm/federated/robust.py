"""Aggregators that hold against clients which send poisoned or broken weights.

They use :attr:`~lightning_sfubm.federated.weights.ClientUpdate.weight` only to leave out clients of weight 0: a number that
a client declares itself would let a poisoned one outweigh the rest. They assume that honest clients resemble each other;
where silos differ much, they drop honest minorities too, which FedAvg does not.

How many clients are needed is known at set-up (``check_clients``, :class:`~lightning_sfubm.errors.ConfigError`). Where
clients drop out and fewer take part in a round, ``aggregate`` raises
:class:`~lightning_sfubm.federated.weights.TooFewClientsError` instead of falling back to something weaker; a round in which
nobody takes part leaves the weights as they were, as everywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.weights import (
    ClientUpdate,
    StatelessAggregator,
    TooFewClientsError,
    like,
    participating,
)


class _RobustAggregator(StatelessAggregator, ABC):
    """Counts clients, stacks their parameters and leaves the rest to :meth:`combine`.

    Attributes:
        min_clients: fewest clients whose aggregate is robust.
        settings: the settings as an error names them.
        way_out: what to change where there are too few clients.
    """

    min_clients = 3
    settings = ""
    way_out = "add clients or use FedAvg"

    def check_clients(self, num_clients: int) -> None:
        """Refuse a federation that is too small even without dropouts.

        Raises:
            ConfigError: it has fewer than ``min_clients`` clients.
        """
        if num_clients < self.min_clients:
            raise ConfigError(f"{self._needs()}, this federation has {num_clients}: {self.way_out}")

    def aggregate(self, current: Mapping[str, Tensor], updates: Mapping[str, ClientUpdate]) -> dict[str, Tensor]:
        """See :class:`~lightning_sfubm.federated.weights.WeightAggregator`."""
        present = participating(current, updates)
        if not present:
            return like(current, current)
        if len(present) < self.min_clients:
            raise TooFewClientsError(
                f"{self._needs()}, only {len(present)} took part in the round ({', '.join(present)}): "
                f"keep the last global weights; if it happens often, {self.way_out}"
            )
        stacked = {key: torch.stack([u.weights[key].detach().double() for u in present.values()]) for key in current}
        return like(current, self.combine(stacked))

    @abstractmethod
    def combine(self, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Combine parameters (n, ...) in float64, clients in sorted order of name, into parameters (...)."""

    def _needs(self) -> str:
        return f"{type(self).__name__}{self.settings} needs at least {self.min_clients} clients"


class CoordinateMedian(_RobustAggregator):
    """The median of each coordinate over clients (Yin et al., 2018, arXiv 1803.01498, Algorithm 1).

    With an even number of clients it is the mean of the two middle values. Holds against fewer than half of the clients;
    needs three, since the median of two is their mean.
    """

    def combine(self, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sort and take the middle."""
        return {key: _middle(x, (len(x) - 1) // 2) for key, x in stacked.items()}


class TrimmedMean(_RobustAggregator):
    """The mean of each coordinate without its extremes (Yin et al., 2018, arXiv 1803.01498, Algorithm 1).

    Of n clients the ``floor(share n)`` highest and as many lowest values of each coordinate are cut, and at least one at
    either end [choice: with few clients, or after dropouts, the protection must not vanish unnoticed]. Needs three clients.

    Args:
        share: of the clients that may be poisoned, in (0, 0.5).

    Raises:
        ConfigError: the share is out of range.
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share < 0.5:
            raise ConfigError(
                f"TrimmedMean: share = {share} must lie in (0, 0.5): 0 is FedAvg, and cutting half from either end leaves "
                "nothing (use CoordinateMedian)"
            )
        self.share = share
        self.settings = f"(share={share})"

    def num_cut(self, num_clients: int) -> int:
        """Values cut at either end."""
        # The tolerance undoes binary fractions: 0.29 * 100 is 28.999999999999996.
        return min(max(1, int(self.share * num_clients + 1e-9)), (num_clients - 1) // 2)

    def combine(self, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sort, cut, and take the mean."""
        return {key: _middle(x, self.num_cut(len(x))) for key, x in stacked.items()}


class Krum(_RobustAggregator):
    """The update closest to its neighbours, or the mean of several such (Blanchard et al., 2017, arXiv 1703.02757).

    The score of a client is the sum of the squared distances, over all parameters together, to its n - f - 2 nearest other
    clients; the ``multi`` clients of the lowest score are averaged with equal weights (Multi-Krum), ties in order of name.

    Args:
        num_byzantine: f, clients that may be poisoned. At least ``2 f + 3`` must take part (the paper's 2 f + 2 < n).
        multi: clients averaged, 1 = Krum. At most n - f, as many as are honest for sure.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, num_byzantine: int = 1, multi: int = 1) -> None:
        if num_byzantine < 0 or multi < 1:
            raise ConfigError(
                f"Krum: num_byzantine = {num_byzantine} must be at least 0 and multi = {multi} at least 1"
            )
        self.num_byzantine, self.multi = num_byzantine, multi
        self.min_clients = max(2 * num_byzantine + 3, num_byzantine + multi)
        self.settings = f"(num_byzantine={num_byzantine}, multi={multi})"
        self.way_out = (
            "add clients, lower num_byzantine or multi (2 num_byzantine + 3 and num_byzantine + multi clients are needed), "
            "or use FedAvg"
        )

    def combine(self, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Score the clients and average the best."""
        scores = self.scores(stacked)
        chosen = scores.argsort(stable=True)[: self.multi]
        return {key: x[chosen].mean(dim=0) for key, x in stacked.items()}

    def scores(self, stacked: Mapping[str, Tensor]) -> Tensor:
        """Krum scores (n,), lower is better, of parameters (n, ...)."""
        flat = [x.reshape(len(x), -1) for _, x in sorted(stacked.items())]
        n = len(flat[0])
        distances = torch.full((n, n), torch.inf, dtype=torch.float64)
        for i in range(n):
            for j in range(i):
                # Differences, not a Gram matrix: weights of one round lie close together, and |a|^2 + |b|^2 - 2ab cancels.
                distances[i, j] = distances[j, i] = sum((x[i] - x[j]).square().sum() for x in flat)
        return distances.sort(dim=1).values[:, : n - self.num_byzantine - 2].sum(dim=1)


def _middle(stacked: Tensor, cut: int) -> Tensor:
    """Mean over clients (n, ...) without the ``cut`` highest and lowest values of each coordinate."""
    return stacked.sort(dim=0).values[cut : len(stacked) - cut].mean(dim=0)
