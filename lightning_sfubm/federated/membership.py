"""Who takes part in a federation across machines: which connected node is which silo, and what carries messages to it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.envelopes import Reply, Request

log = logging.getLogger(__name__)


class Transport(Protocol):
    """What carries requests to silos and replies back."""

    def nodes(self) -> Mapping[int, str]:
        """Nodes that are connected, with the name each was registered under, or an empty one."""
        ...

    def ask(self, requests: Mapping[int, Request], deadline_s: float) -> Mapping[int, Reply]:
        """Send a request to each node and return the replies that arrived in time; a reply that is not one is left out."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long the coordinator waits.

    Attributes:
        start_s: for the silos to connect and to answer the first request.
        round_s: for an exchange or a round; who has not answered by then has dropped out of it.
        finish_s: for the local phases. They need no server: a silo that takes longer goes on alone.
        poll_s: between two looks at which nodes are connected.
        retry_s: before a node that refused is asked again, at the next occasion.
    """

    start_s: float = 600.0
    round_s: float = 3600.0
    finish_s: float = 86400.0
    poll_s: float = 3.0
    retry_s: float = 60.0


class Membership:
    """Asks connected nodes who they are, and remembers which is which silo.

    Args:
        silos: names of all silos.
        transport: carries requests and replies.
        patience: deadlines.
        agree: called with the answer of a silo before it is taken; raises where it does not fit.
    """

    def __init__(
        self, silos: Sequence[str], transport: Transport, patience: Patience, agree: Callable[[Reply], None]
    ) -> None:
        self.silos, self.transport, self.patience, self._agree = silos, transport, patience, agree
        self.known: dict[str, int] = {}  #: node by silo
        self._refused: dict[int, float] = {}  # when, by node

    def gather(self, wanted: Sequence[str], fewest: int, hello: Callable[[], Request]) -> None:
        """Wait until the wanted silos are there, or time is up.

        Args:
            wanted: names.
            fewest: of them must be there in the end; others, which take part later, do not count.
            hello: makes the request that asks a node who it is.

        Raises:
            ConfigError: fewer came.
        """
        end = time.monotonic() + self.patience.start_s
        while not set(wanted) <= set(self.known) and time.monotonic() < end:
            self.greet(hello, end - time.monotonic())
            if not set(wanted) <= set(self.known):
                time.sleep(self.patience.poll_s)
        missing = sorted(set(self.silos) - set(self.known))
        came = set(wanted) & set(self.known)
        if len(came) < fewest:
            raise ConfigError(
                f"{len(came)} silos came within {self.patience.start_s:g} s, {fewest} of {sorted(wanted)} are needed; missing: "
                f"{missing}. Their own logs say why where they refused"
            )
        log.info("silos: %s%s", ", ".join(sorted(self.known)), f"; missing: {', '.join(missing)}" if missing else "")

    def greet(self, hello: Callable[[], Request], deadline_s: float) -> None:
        """Ask every node that is new who it is; take the ones whose names and shared weights fit."""
        nodes, now = self.transport.nodes(), time.monotonic()
        refused = {node for node, when in self._refused.items() if now - when < self.patience.retry_s}
        new = {node: hello() for node in nodes if node not in {*self.known.values(), *refused}}
        for node, reply in sorted(self.transport.ask(new, deadline_s).items()) if new else []:
            try:
                self._welcome(node, reply, nodes)
            except (MessageError, ConfigError) as error:
                log.warning("a silo is not taken: %s", error)
                self._refused[node] = now

    def _welcome(self, node: int, reply: Reply, nodes: Mapping[int, str]) -> None:
        name, registered = reply.silo, nodes[node]
        if reply.error:
            raise ConfigError(f"'{name}' refused ({reply.error}); its own log says why")
        if name not in self.silos:
            raise ConfigError(f"'{name}' is not among the silos {list(self.silos)}")
        if registered and registered != name:
            raise ConfigError(f"the node that is registered as '{registered}' says that it is '{name}'")
        if self.known.get(name) in nodes:
            raise ConfigError(f"two nodes say that they are '{name}'")
        self._agree(reply)
        self.known[name] = node
        log.info("silo '%s' is there", name)
