"""The server's side of a federation across machines: the schedule of the loop, with requests in the place of clients.

    hello to every silo  ->  semantics up, server mixes  ->  rounds: teacher down, local epochs, weights up, aggregation
    ->  finish: the last teacher down, local phases on each silo, nothing up

It holds a :class:`~lightning_sfubm.federated.server.Server` and knows silos by what they send. Its state is written after the
exchange and after every round; a coordinator that is killed goes on at the last complete round, and silos answer again what
they have already done. A silo that does not answer in time, refuses, or sends what the schema refuses has dropped out of the
round, as in the loop.
"""

import copy
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError
from lightning_sfubm.federated.checkpoint import find_state, load_state, read_loop, save_state
from lightning_sfubm.federated.envelopes import (
    Action,
    Reply,
    Request,
    check_across_machines,
    describe_shapes,
    read_shapes,
    terms,
)
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.ledger import Ledger
from lightning_sfubm.federated.membership import Membership, Patience, Transport
from lightning_sfubm.federated.messages import Message, MessageSchema, ReplayGuard, teacher_schema, unpack
from lightning_sfubm.federated.outbox import Outbox
from lightning_sfubm.federated.progress import Progress
from lightning_sfubm.federated.run_name import lasting_name
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.settings import named_difference
from lightning_sfubm.federated.weights import TooFewClientsError

log = logging.getLogger(__name__)


class Coordinator:
    """Drives silos through a :class:`~lightning_sfubm.federated.federation.Federation`.

    Args:
        federation: the schedule.
        silos: names of all silos, also of those that join later.
        transport: carries requests and replies.
        run_dir: where states and the server's own message ledger are written.
        seed: root seed, the same for all.
        min_silos: silos that must be there before the run starts, of those that take part from the start; ``None`` = all of
            them. A run that goes on waits for the others as long, and then goes on without them.
        patience: deadlines.

    Raises:
        ConfigError: no silo, an unknown one in a setting, or a schedule that cannot be carried across machines.
    """

    def __init__(
        self,
        federation: Federation,
        silos: list[str],
        transport: Transport,
        run_dir: Path,
        seed: int,
        min_silos: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        if not silos or len(set(silos)) != len(silos):
            raise ConfigError(f"silos = {silos}: give every silo of the federation once, by name")
        check_across_machines(federation)
        federation.check_clients(silos)
        self.federation, self.silos, self.transport = federation, sorted(silos), transport
        self.run_dir, self.seed = run_dir, seed
        self.min_silos = min_silos
        self.patience = patience if patience is not None else Patience()
        self.members = Membership(self.silos, transport, self.patience, self._agree)
        self.progress = Progress()
        self.ledger = Ledger(run_dir / "ledger.jsonl")
        self.outbox = Outbox(run_dir / "outbox", self.checkpoints)
        self._server: Server | None = None

    @property
    def server(self) -> Server:
        """The server; there is none before the first silo has said what it shares."""
        if self._server is None:
            raise ConfigError("no silo has said hello yet")
        return self._server

    @property
    def checkpoints(self) -> Path:
        """Folder of the states."""
        return self.run_dir / "checkpoints"

    def run(self) -> None:
        """Run to the end, from the newest whole state where there is one; nobody is waited for where all have finished.

        Raises:
            ConfigError: too few silos came, or another coordinator is at work in this folder.
            CheckpointError: the folder holds a run of another schedule, of another kind, or a torn one.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.run_dir / ".lock", timeout=60):  # one that was killed is gone by then
                self._run()
        except Timeout:
            raise ConfigError(f"{self.run_dir}: another ServerApp is at work there; end it first") from None

    def _run(self) -> None:
        federation, progress = self.federation, self.progress
        if any(self.checkpoints.glob("state-*")):
            self._resume()
            progress = self.progress
            if progress.round >= federation.rounds and set(self.silos) <= set(progress.finished):
                log.info("all silos finished after %d rounds before: nothing is left to do", progress.round)
                return
            log.info("going on after round %d of %d", progress.round, federation.rounds)
        else:
            self.ledger.resume(0)
            # before anything is sent: silos keep to the name, also if there is no state to go on from yet
            progress.federation = lasting_name(self.run_dir / "federation.id", progress.federation)
        self._gather()
        if progress.exchanged is None and len(federation.active(self.silos, 0)) > 1:
            self._exchange_semantics(0)
        for number in range(progress.round + 1, federation.rounds + 1):
            started = time.monotonic()
            self._round(number)
            log.info("round %d of %d: %.1f s", number, federation.rounds, time.monotonic() - started)
        self._finish()

    # ------------------------------------------------------------------ who is there

    def _gather(self) -> None:
        progress, wanted = self.progress, self.federation.active(self.silos, self.progress.round + 1)
        if progress.step and progress.round >= self.federation.rounds:  # the last message is still to be delivered
            wanted = sorted(set(self.silos) - set(progress.finished))
        wanted = wanted or self.silos
        fewest = 1 if progress.step else min(len(wanted), self.min_silos or len(wanted))
        self.members.gather(wanted, max(1, fewest), lambda: self._request("hello", 0))

    def _greet(self) -> None:
        self.members.greet(lambda: self._request("hello", 0))

    def _agree(self, reply: Reply) -> None:
        """Build the server from the first silo's description; every other must start from the same weights."""
        dim, template = read_shapes(reply.shape)
        if bool(template) != self.federation.sends_teacher:
            raise ConfigError(f"'{reply.silo}' does not share what exchange = '{self.federation.exchange}' says")
        initial = dict(template)
        if template:
            message = self._checked(teacher_schema(template, with_weight=False), reply.silo, 0, reply.teacher)
            self.ledger.record(reply.silo, "up", message, {})
            initial = message.tensors
        digest = hashlib.sha256(describe_shapes(dim, template).encode())
        for tensor in initial.values():
            digest.update(tensor.numpy().tobytes())
        self.progress.start = self.progress.start or digest.hexdigest()
        if digest.hexdigest() != self.progress.start:
            raise ConfigError(f"'{reply.silo}' starts from other shared weights than the others: same model and seed?")
        if self._server is None:
            self._server = Server(
                self.federation.aggregator,
                dim,
                initial or None,
                copy.deepcopy(self.federation.weights),
                self.federation.weighting,
                self.federation.max_items,
            )
            if self.progress.step:
                load_state(find_state(self.checkpoints), self._server, {})

    # ------------------------------------------------------------------ the schedule

    def _exchange_semantics(self, round: int) -> None:
        if not self.federation.sends_semantics:
            return
        active = self.federation.active(self.silos, round)
        replies = self._ask(round, {name: self._request("semantics", round) for name in active})
        uploads = self._accepted(round, replies, self.server.semantics, lambda reply: reply.semantics)
        for name, answer in self.server.aggregate_semantics(round, uploads).items():
            self._post(name, answer)
        self.progress.exchanged = round
        self._checkpoint()

    def _round(self, number: int) -> None:
        federation, progress = self.federation, self.progress
        if federation.joined(self.silos, number) and progress.exchanged != number:
            self._greet()
            self._exchange_semantics(number)
        self._greet()
        drawn = federation.sample(self.silos, number, self.seed)
        replies = self._ask(number, {name: self._request("train", number, name) for name in drawn})
        arrived = list(replies)
        if federation.sends_teacher and len(self.silos) > 1:
            assert self.server.teacher is not None
            updates = self._accepted(number, replies, self.server.teacher, lambda reply: reply.teacher)
            arrived = self._aggregate(number, updates)
        for name, last in federation.leaves.items():
            if last == number < federation.rounds and name in arrived and self.server.version:
                self._post(name, self.server.broadcast())  # it goes on alone with what this round gave
        progress.round = number
        self._checkpoint()

    def _aggregate(self, number: int, updates: dict[str, bytes]) -> list[str]:
        try:
            if len(updates) < self.federation.min_updates:
                raise TooFewClientsError(f"{len(updates)} updates arrived, {self.federation.min_updates} are needed.")
            self.server.aggregate_teacher(number, updates)
        except TooFewClientsError as error:
            log.warning("round %d: %s The global teacher stays as it was.", number, error)
        return list(updates)

    def _finish(self) -> None:
        self._greet()
        left = [name for name in self.silos if name not in self.progress.finished]
        number = self.federation.rounds + 1
        if not self.progress.closed and set(left) & set(self.members.known):
            self.progress.closed = True
            self._checkpoint()  # before they are asked: their answers may take a day, and a later process must know of it
        replies = self._ask(
            number, {name: self._request("finish", number, name) for name in left}, self.patience.finish_s
        )
        self.progress.finished = sorted({*self.progress.finished, *replies})
        if self._checkpoint():
            self._checkpoint()  # no later state would take the place of the one that refers to what is now delivered
        missing = sorted(set(self.silos) - set(self.progress.finished))
        if missing:
            log.warning(
                "not known to have finished: %s. The same command again asks them once more", ", ".join(missing)
            )
        log.info("finished after %d rounds", self.progress.round)

    # ------------------------------------------------------------------ messages

    def _request(self, action: Action, number: int, name: str = "") -> Request:
        semantics = teacher = b""
        if name:
            semantics = self._posted(name, "semantics")
            gone = self.federation.leaves.get(name, number) < min(number, self.federation.rounds)
            if gone:
                teacher = self._posted(name, "teacher")
            elif self.federation.sends_teacher and self.server.version and len(self.silos) > 1:
                teacher = self.server.broadcast().payload
        agreed = terms(self.federation, self.seed)
        return Request(action, self.progress.federation, number, agreed, semantics, teacher)

    def _ask(self, round: int, requests: dict[str, Request], deadline_s: float | None = None) -> dict[str, Reply]:
        """Replies of the silos that complied, in sorted order; all others are noted as dropped."""
        nodes = self.transport.nodes()
        there = {
            self.members.known[n]: request for n, request in requests.items() if self.members.known.get(n) in nodes
        }
        self._record_down(round, {n: requests[n] for n, node in self.members.known.items() if node in there})
        replies = (
            self.transport.ask(there, self.patience.round_s if deadline_s is None else deadline_s) if there else {}
        )
        complied = {}
        for name in sorted(requests):
            reply = replies.get(self.members.known.get(name, -1))
            if reply is not None and not reply.error and reply.silo == name:
                complied[name] = reply
                if requests[name].action in ("train", "finish"):
                    self.progress.outbox.pop(name, None)  # delivered
            else:
                reason = "did not answer" if reply is None else reply.error or f"says that it is '{reply.silo}'"
                self._drop(round, name, reason if name in self.members.known else "never came")
        return complied

    def _accepted(
        self, round: int, replies: dict[str, Reply], schema: MessageSchema, pick: Callable[[Reply], bytes]
    ) -> dict[str, bytes]:
        """Messages that the server will take, checked one by one so that a bad one drops its sender alone."""
        accepted, guard = {}, ReplayGuard()
        guard.load_state_dict(self.server.guard.state_dict())  # a copy: the server's own refuses all of them or none
        for name, reply in replies.items():
            try:
                message = self._checked(schema, name, round, pick(reply))
                guard.accept(message, round, name)
            except MessageError as error:
                self._drop(round, name, f"message refused: {error}")
                continue
            self.ledger.record(name, "up", message, {})
            accepted[name] = message.payload
        return accepted

    @staticmethod
    def _checked(schema: MessageSchema, name: str, round: int, payload: bytes) -> Message:
        message = unpack(schema, payload)
        if (message.client, message.round) != (name, round):
            raise MessageError(
                f"'{name}' sent a message of '{message.client}' and round {message.round} in round {round}"
            )
        return message

    def _drop(self, round: int, name: str, reason: str) -> None:
        log.warning("round %d: silo '%s' dropped out (%s)", round, name, reason)
        self.progress.dropped.setdefault(str(round), []).append(name)

    def _record_down(self, round: int, requests: dict[str, Request]) -> None:
        for name, request in sorted(requests.items()):
            for kind in ("semantics", "teacher"):
                if payload := getattr(request, kind):
                    self.ledger.record_bytes(name, "down", kind, round, payload, {})

    # ------------------------------------------------------------------ files

    def _post(self, name: str, message: Message) -> None:
        """Keep a message until its silo takes part again."""
        self.outbox.keep(message)
        self.progress.outbox.setdefault(name, {})[message.kind] = message.sha256

    def _posted(self, name: str, kind: str) -> bytes:
        sha256 = self.progress.outbox.get(name, {}).get(kind)
        return b"" if sha256 is None else self.outbox.read(sha256)

    def _resume(self) -> None:
        state = find_state(self.checkpoints)
        stored: dict[str, Any] = read_loop(state)["stored"]
        if not {"progress", "schedule", "silos"} <= set(stored):
            raise CheckpointError(
                f"{state}: was not written by a server of silos on machines of their own: give the server another run_dir"
            )
        agreed = self._agreed()
        # states of an earlier version do not say how they were aggregated
        written = {key: stored.get(key, agreed[key] if key == "aggregation" else None) for key in agreed}
        if differs := named_difference(written, agreed, "{} was {!r} and is {!r}"):
            raise CheckpointError(
                f"{self.checkpoints}: was written by another schedule or for other silos: {differs}; set it back, or give the "
                "server another run_dir"
            )
        self.progress = Progress(**stored["progress"])
        self.progress.check_rounds(self.federation.rounds, self.checkpoints)
        self.ledger.resume(self.progress.ledger)

    def _agreed(self) -> dict[str, Any]:
        """What a server that goes on must share with the one before, as JSON values."""
        schedule, aggregation = dict(self.federation.schedule(self.seed)), self.federation.aggregation()
        return {"schedule": schedule, "aggregation": aggregation, "silos": self.silos}

    def _checkpoint(self) -> bool:
        """Write a state; returns whether an older one still refers to messages that this one does not."""
        self.progress.step += 1
        self.progress.ledger = self.ledger.entries
        stored = {"progress": vars(self.progress), **self._agreed()}
        self.ledger.flush()
        save_state(self.checkpoints, self.progress.step, stored, self.server, {})
        return self.outbox.clean()
