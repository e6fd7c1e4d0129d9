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

    def send(self, requests: Mapping[int, Request], deadline_s: float) -> None:
        """Send a request to each node without waiting; its reply, if it comes in time, is given out by :meth:`arrived`."""
        ...

    def arrived(self) -> Mapping[int, Reply | None]:
        """Replies to what was sent, by node, that came since the last call; ``None`` where it is known that none will come."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long the coordinator waits.

    Attributes:
        start_s: for the silos to connect and to answer the first request, for which some prepare their data.
        round_s: for an exchange or a round; who has not answered by then has dropped out of it.
        finish_s: for the local phases. They need no server: a silo that takes longer goes on alone.
        poll_s: between two looks at which nodes are connected.
        retry_s: before a node that refused is asked again, at the next occasion.
        hello_s: before a round, for a node that is new to say who it is. The round does not wait for it any longer, nor does a
            later one: it is there from the next round on when its answer comes.
    """

    start_s: float = 600.0
    round_s: float = 3600.0
    finish_s: float = 86400.0
    poll_s: float = 3.0
    retry_s: float = 60.0
    hello_s: float = 60.0


class Membership:
    """Asks connected nodes who they are, and remembers which is which silo.

    Nobody waits for one node's answer alone: it is asked once, has the longer of ``start_s`` and ``round_s`` to answer, and is
    taken whenever it does, while others come and rounds go on. It is asked again when that time is over, when it has been away,
    or when its task failed.

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
        self._asked: dict[int, float] = {}  # when, by node whose answer is still to come
        self._mute: set[int] = set()  # nodes that a round has waited for

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
        self._meet(hello)
        while not set(wanted) <= set(self.known) and time.monotonic() < end:
            time.sleep(min(self.patience.poll_s, max(0.0, end - time.monotonic())))
            self._meet(hello)
        missing = sorted(set(self.silos) - set(self.known))
        came = set(wanted) & set(self.known)
        if len(came) < fewest:
            raise ConfigError(
                f"{len(came)} silos came within {self.patience.start_s:g} s, {fewest} of {sorted(wanted)} are needed; missing: "
                f"{missing}. Their own logs say why where they refused"
            )
        log.info("silos: %s%s", ", ".join(sorted(self.known)), f"; missing: {', '.join(missing)}" if missing else "")

    def greet(self, hello: Callable[[], Request]) -> None:
        """Before a round: meet who is new. One that does not answer is waited for once, for ``hello_s`` at most.

        Args:
            hello: makes the request that asks a node who it is.
        """
        while self._meet(hello) and self._awaited():
            time.sleep(self.patience.poll_s)
        self._mute |= set(self._asked)

    def _awaited(self) -> bool:
        """Whether an answer may still come in time that this round needs."""
        since = time.monotonic() - min(self.patience.hello_s, self.patience.round_s)
        return any(asked > since and node not in self._mute for node, asked in self._asked.items())

    def _meet(self, hello: Callable[[], Request]) -> bool:
        """Ask every node that is new who it is, and take the ones that have answered and whose names and shared weights fit.

        Returns:
            Whether a silo is missing.
        """
        nodes, now = self.transport.nodes(), time.monotonic()
        allowed = max(self.patience.start_s, self.patience.round_s)
        self._mute &= set(nodes)  # one that was away is another process, and new
        self._asked = {n: asked for n, asked in self._asked.items() if n in nodes and now - asked < allowed}
        refused = {node for node, when in self._refused.items() if now - when < self.patience.retry_s}
        new = {node: hello() for node in nodes if node not in {*self.known.values(), *refused, *self._asked}}
        if new:
            self._asked |= dict.fromkeys(new, now)
            self.transport.send(new, allowed)
        for node, reply in sorted(self.transport.arrived().items()):
            self._asked.pop(node, None)
            if reply is None:
                self._mute.add(node)  # asked again, but not waited for
            elif node in nodes and node not in self.known.values():
                self._take(node, reply, nodes)
        return any(self.known.get(name) not in nodes for name in self.silos)

    def _take(self, node: int, reply: Reply, nodes: Mapping[int, str]) -> None:
        try:
            self._welcome(node, reply, nodes)
        except (MessageError, ConfigError) as error:
            log.warning("a silo is not taken: %s", error)
            self._refused[node] = time.monotonic()

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
