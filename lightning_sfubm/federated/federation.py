"""The federated schedule: what is exchanged, for how many rounds, and who takes part in each."""

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.aggregation import KNNMix, NoAggregation, SemanticAggregator
from lightning_sfubm.federated.describe import describe
from lightning_sfubm.federated.messages import MAX_ITEMS
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.shares import clients_of
from lightning_sfubm.federated.weights import FedAvg, WeightAggregator
from lightning_sfubm.seeds import numpy_generator

log = logging.getLogger(__name__)
Exchange = Literal["semantics", "teacher", "both", "nothing"]


class Federation:
    """Settings of the federated schedule, given as ``trainer.federation``.

    Args:
        rounds: R, at least 0.
        local_epochs: E, epochs a client trains in a round.
        exchange: what travels: item semantics, teacher weights, both, or nothing (the "no transfer" row: the same
            schedule without any message). The default was chosen on validation (docs/results.md).
        aggregator: of item semantics; ``None`` for :class:`~lightning_sfubm.federated.aggregation.KNNMix`.
        weights: of the shared teacher; ``None`` for :class:`~lightning_sfubm.federated.weights.FedAvg`.
        weighting: of the updates; ``"examples"`` discloses each client's number of training interactions, unless
            aggregation is secure.
        secure_aggregation: the server learns the mean of the updates and no single one; ``None`` = it sees them.
        participation: share of the active clients drawn for a round, in (0, 1]; at least one is drawn.
        min_updates: updates without which a round leaves the shared teacher as it was.
        max_items: items a silo may have: bounds the size of its message before it is parsed, 4 D bytes an item.
        client_epochs: epochs a round by client, where other than ``local_epochs``.
        joins: round (from 1) in which a client takes part for the first time, by client; others are there from the start.
        leaves: last round in which a client takes part, by client. It goes on alone with what it has received.
        local_max_epochs: bound of each local phase after the rounds.
        local_min_epochs: epochs before which a local phase does not stop.
        patience: epochs without improvement of ``monitor`` that end a local phase.
        monitor: validation metric of the local phases.
        keep_messages: keep every message as it travelled below ``<run_dir>/messages``, for ``lightning-sfubm audit``. They are
            as sensitive as what they disclose: item vectors and weights in the clear. By default only hashes are kept.
        workers: processes that train clients side by side, one thread each; 0 = one after the other in this process. The
            result is that of one process with one thread, bit for bit.

    Raises:
        ConfigError: a number is out of range, or aggregation is secure and the exchange sends no teacher.
    """

    def __init__(
        self,
        rounds: int = 5,
        local_epochs: int = 1,
        exchange: Exchange = "semantics",
        aggregator: SemanticAggregator | None = None,
        weights: WeightAggregator | None = None,
        weighting: Literal["uniform", "examples"] = "uniform",
        secure_aggregation: SecureAggregation | None = None,
        participation: float = 1.0,
        min_updates: int = 1,
        max_items: int = MAX_ITEMS,
        client_epochs: dict[str, int] | None = None,
        joins: dict[str, int] | None = None,
        leaves: dict[str, int] | None = None,
        local_max_epochs: int = 60,
        local_min_epochs: int = 8,
        patience: int = 5,
        monitor: str = "val/ndcg@10",
        keep_messages: bool = False,
        workers: int = 0,
    ) -> None:
        if rounds < 0 or local_epochs < 1 or patience < 1 or not 1 <= local_min_epochs <= local_max_epochs:
            raise ConfigError(
                f"federation: rounds = {rounds} (>= 0), local_epochs = {local_epochs} (>= 1), patience = {patience} (>= 1), "
                f"1 <= local_min_epochs = {local_min_epochs} <= local_max_epochs = {local_max_epochs} is required"
            )
        if workers < 0:
            raise ConfigError(f"federation: workers = {workers} must not be negative")
        self.workers = workers
        if max_items < 1:
            raise ConfigError(f"federation: max_items = {max_items} must be at least 1")
        self.max_items = max_items
        if not 0 < participation <= 1 or min_updates < 1:
            raise ConfigError(
                f"federation: participation = {participation} must lie in (0, 1], min_updates = {min_updates} be at least 1"
            )
        self.rounds, self.local_epochs, self.exchange, self.weighting = rounds, local_epochs, exchange, weighting
        self.aggregator: SemanticAggregator = aggregator if aggregator is not None else KNNMix()
        self.weights: WeightAggregator = weights if weights is not None else FedAvg()
        self.secure_aggregation = secure_aggregation
        self.participation, self.min_updates = participation, min_updates
        if secure_aggregation is not None:
            self.weights.check_clients(1)  # it will see one update, the mean
        self._check_unread()
        self.client_epochs, self.joins, self.leaves = client_epochs or {}, joins or {}, leaves or {}
        for entry, given in (("client_epochs", self.client_epochs), ("joins", self.joins), ("leaves", self.leaves)):
            for name, number in given.items():
                if number < (0 if entry == "leaves" else 1):
                    raise ConfigError(f"federation: {entry} gives '{name}' the number {number}; it must be positive")
        self.local_max_epochs, self.local_min_epochs = local_max_epochs, local_min_epochs
        self.patience, self.monitor = patience, monitor
        self.keep_messages = keep_messages

    def _check_unread(self) -> None:
        """Settings of a shared teacher where none is shared: refuse the one that would seem to protect, warn of the others."""
        if self.sends_teacher:
            return
        if self.secure_aggregation is not None:
            raise ConfigError(
                f"federation: secure_aggregation masks teacher weights, and exchange: {self.exchange} sends none: set exchange "
                "to 'teacher' or 'both', or remove it (item semantics have the aggregator SecureKMeans)"
            )
        given = {
            "weights": type(self.weights) is not FedAvg,
            "weighting": self.weighting != "uniform",
            "min_updates": self.min_updates > 1,
        }
        unread = [name for name, is_set in given.items() if is_set]
        if unread and self.exchange != "nothing":  # the control of the same settings, where nothing is sent at all
            log.warning(
                "federation: %s: for the weights of a shared teacher, of which exchange: %s sends none; no effect",
                ", ".join(unread),
                self.exchange,
            )

    @property
    def sends_semantics(self) -> bool:
        """Whether item vectors travel."""
        return self.exchange in ("semantics", "both") and not isinstance(self.aggregator, NoAggregation)

    @property
    def sends_teacher(self) -> bool:
        """Whether teacher weights travel."""
        return self.exchange in ("teacher", "both")

    def check_clients(self, names: Iterable[str]) -> None:
        """Compare the settings with the clients there are.

        Raises:
            ConfigError: a setting names a client that is not there, or a round draws too few clients for the shared teacher to
                be aggregated.
        """
        known = sorted(names)
        for entry, given in (("client_epochs", self.client_epochs), ("joins", self.joins), ("leaves", self.leaves)):
            for name in given:
                if name not in known:
                    raise ConfigError(f"federation: {entry} names '{name}'; the clients are {', '.join(known)}")
        if self.sends_teacher and len(known) > 1:
            self._check_rounds(known)

    def _check_rounds(self, known: list[str]) -> None:
        smallest, secure = self.smallest_round(known), self.secure_aggregation
        self.weights.check_clients(smallest)
        wanted = {"min_updates": self.min_updates, "secure_aggregation": 1 if secure is None else 2}
        for setting, fewest in wanted.items():
            if smallest < fewest:
                raise ConfigError(
                    f"federation: {setting} needs {fewest} updates a round, and the smallest round draws {smallest} of "
                    f"{len(known)} clients: raise participation, change joins and leaves, or "
                    + ("lower it" if setting == "min_updates" else "remove it")
                )
        if secure is not None:
            secure.check_clients(len(known), weighted=self.weighting == "examples")

    def of(self, client: str) -> "Federation":
        """A silo's own part of the schedule, without what it says of clients that are elsewhere."""
        own = copy.copy(self)
        for entry in ("client_epochs", "joins", "leaves"):
            given: dict[str, int] = getattr(self, entry)
            setattr(own, entry, {name: number for name, number in given.items() if name == client})
        return own

    def epochs(self, client: str) -> int:
        """Epochs a client trains in a round."""
        return self.client_epochs.get(client, self.local_epochs)

    def active(self, names: Iterable[str], round: int) -> list[str]:
        """Clients that belong to the federation in a round, sorted. Round 0 is the exchange before the first."""
        return [
            name
            for name in sorted(names)
            if self.joins.get(name, 1) <= max(round, 1) and max(round, 1) <= self.leaves.get(name, math.inf)
        ]

    def sample(self, names: Iterable[str], round: int, seed: int) -> list[str]:
        """Clients that train in a round, sorted: a draw of its own for every round, whatever the order of the names."""
        active = self.active(names, round)
        count = max(1, clients_of(self.participation, len(active))) if active else 0
        if count == len(active):
            return active
        chosen = numpy_generator(seed, "participation", round).permutation(len(active))[:count]
        return [active[index] for index in sorted(chosen)]

    def smallest_round(self, names: Iterable[str]) -> int:
        """The fewest clients that are drawn for any round, less rounds for which all have left: those change nothing."""
        names = list(names)
        sizes = [len(self.active(names, number)) for number in range(1, self.rounds + 1)]
        return min(max(1, clients_of(self.participation, size)) for size in [s for s in sizes if s] or [len(names)])

    def joined(self, names: Iterable[str], round: int) -> list[str]:
        """Clients that take part for the first time in a round later than the first."""
        return [name for name in self.active(names, round) if round > 1 and self.joins.get(name, 1) == round]

    def exchanges(self, names: Iterable[str]) -> int:
        """How often item semantics are exchanged in a whole run: at the start, and when clients join later.

        A run may be extended past its rounds, so later joins count too.
        """
        known = set(names)
        return 1 + len({number for name, number in self.joins.items() if name in known and number > 1})

    def aggregation(self) -> dict[str, object]:
        """What the server makes of what is sent, as JSON values; of parts that the exchange does not use nothing is said."""
        used: dict[str, object] = {}
        if self.exchange in ("semantics", "both"):
            used["aggregator"] = describe(self.aggregator)
        if self.sends_teacher:
            used |= {"weights": describe(self.weights), "min_updates": self.min_updates}
        return used

    def schedule(self, seed: int) -> Mapping[str, object]:
        """What a resumed run must share with the one it goes on with; the number of rounds may grow."""
        return {
            "local_epochs": self.local_epochs,
            "exchange": self.exchange,
            "seed": seed,
            "participation": self.participation,
            "secure_aggregation": self.secure_aggregation is not None,
            "weighting": self.weighting,
            "client_epochs": dict(sorted(self.client_epochs.items())),
            "joins": dict(sorted(self.joins.items())),
            "leaves": dict(sorted(self.leaves.items())),
        }
