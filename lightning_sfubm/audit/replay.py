"""What the recorded messages amount to: uploads of item vectors, and updates of the shared teacher."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.audit.guarantee import coverage
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.messages import Message
from lightning_sfubm.privacy.secure_kmeans import nearest_centroids

if TYPE_CHECKING:
    from lightning_sfubm.federated.client import Client

_CENTROIDS = "semantics centroids"
GLOBAL = ""  #: stands for the aggregated teacher where an update names its client


@dataclass(frozen=True)
class Upload:
    """Item vectors as sent, rows in the order of the catalogue."""

    client: str
    round: int
    vectors: Tensor
    sigma: float


@dataclass(frozen=True)
class Update:
    """The teacher before and after a round: of one client, or aggregated (``client`` is :data:`GLOBAL`).

    Attributes:
        client: who sent it.
        round: its round.
        before: weights the round started from.
        after: weights as sent.
        views: global view (N, D) of each client's items at that time; a client without one is missing.
        privacy: the bound of differential privacy that covers this and all before it; empty = no guarantee.
    """

    client: str
    round: int
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    views: Mapping[str, Tensor]
    privacy: Mapping[str, Any] = field(default_factory=dict)


def replay(
    messages: Iterable[tuple[Mapping[str, Any], Message]],
    lines: Iterable[Mapping[str, Any]],
    clients: "Mapping[str, Client]",
    initial: Mapping[str, Tensor],
    protected: Callable[[str], Tensor],
) -> tuple[list[Upload], list[Update]]:
    """Read checked messages in order.

    Args:
        messages: ledger lines with their messages; what was resent after an interruption is read once.
        lines: all lines of the ledger; masked updates are not among the messages, but their guarantees are here.
        clients: by name, to put vectors into the order of their catalogues.
        initial: shared weights that every client starts from.
        protected: item vectors (N, D) of a client as its callbacks leave them, rows in its private order: what it compares
            with the centroids that it is sent.

    Raises:
        ConfigError: a client has another number of items than its messages speak of.
    """
    uploads: list[Upload] = []
    updates: list[Update] = []
    views: dict[str, Tensor] = {}
    compared: dict[str, Tensor] = {}
    lines = list(lines)
    held = dict.fromkeys(clients, initial)
    current = initial
    seen: set[tuple[Any, ...]] = set()
    for entry, message in messages:
        name, round = entry["client"], entry["round"]
        key = (name, round, entry["kind"], entry["direction"], entry["content_sha256"])
        again = key in seen and entry["kind"] != _CENTROIDS  # of centroids the last that were sent make the view
        if again or name not in clients:
            continue
        seen.add(key)
        what = (entry["kind"], entry["direction"])
        if what == ("semantics", "up"):
            vectors = _in_order(clients[name], message)
            uploads.append(Upload(name, round, vectors, float(entry["mechanism"].get("sigma", 0.0))))
        elif what == ("semantics", "down"):
            views = {**views, name: _in_order(clients[name], message)}
        elif what == (_CENTROIDS, "down"):
            if name not in compared:
                compared[name] = normalize(protected(name).float(), dim=1)
            view = nearest_centroids(compared[name], message.tensors["centroids"])
            views = {**views, name: clients[name].in_catalogue_order(view)}
        elif what == ("teacher", "up"):
            weights = {key: value for key, value in message.tensors.items() if key != "__weight__"}
            updates.append(Update(name, round, held[name], weights, views, _bounds(lines, round).get(name) or {}))
        elif what == ("teacher", "down"):
            held[name] = message.tensors
            if not any(u.client == GLOBAL and u.round == round for u in updates):
                updates.append(Update(GLOBAL, round, current, message.tensors, views, _weakest(_bounds(lines, round))))
                current = message.tensors
    return uploads, updates


def _in_order(client: "Client", message: Message) -> Tensor:
    vectors, items = message.tensors["vectors"], len(client.semantics())
    if len(vectors) != items:
        raise ConfigError(
            f"client '{client.name}' has {items} items, its message of round {message.round} has {len(vectors)}: the audit "
            "needs the configuration and the data of the run"
        )
    return client.in_catalogue_order(vectors)


def _bounds(lines: Iterable[Mapping[str, Any]], round: int) -> dict[str, Mapping[str, Any] | None]:
    """By client, the bound that covers everything made of behaviour that went up until a round; ``None`` = there is none."""
    until = coverage(line for line in lines if line["round"] <= round)
    return {row["client"]: row["bound"] for row in until if row["protects"] == "user"}


def _weakest(bounds: Mapping[str, Mapping[str, Any] | None]) -> Mapping[str, Any]:
    """The guarantee of a mean: each user has that of their own client, so the weakest is promised to all."""
    known = [bound for bound in bounds.values() if bound]
    if not known or len(known) < len(bounds):
        return {}
    return max(known, key=lambda bound: (bound["epsilon"], bound["delta"]))
