"""The federated loop: rounds over clients, then local training to early stopping.

    before the first: item semantics up (perturbed by a callback)  ->  server mixes  ->  global views down
    for every round:  the clients drawn for it train E epochs  ->  shared weights up  ->  server aggregates  ->  down
    after the last:   every client trains its local phases (teacher, then student) to early stopping on validation

Item vectors are frozen, so one exchange says all there is to say; it is repeated only when a client joins later. The loop
writes its state (:mod:`lightning_sfubm.federated.checkpoint`) after every piece of work: the exchange, each client's local
training, each aggregation, each local phase. Every piece draws from streams named after it, so one that was cut off is
done again from the state before it and comes out the same, bit for bit.
"""

import copy
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_sfubm.errors import CheckpointError, ConfigError, PrivacyError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.checkpoint import find_state, load_state, save_state
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import ClientDropped, FederatedCallback
from lightning_sfubm.federated.ledger import Ledger
from lightning_sfubm.federated.messages import Message, MessageSchema, pack, unpack
from lightning_sfubm.federated.recording import FOLDER, MessageStore
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.weights import TooFewClientsError
from lightning_sfubm.federated.workers import Job, Trained, WorkerPool
from lightning_sfubm.training import Stopwatch

__all__ = ["Counters", "FederatedLoop", "Federation"]
log = logging.getLogger(__name__)


@dataclass
class Counters:
    """Where a run stands.

    Attributes:
        step: states written.
        round: rounds that are complete.
        exchanged: round of the last exchange of semantics, 0 = before the first; ``None`` = none yet.
        trained: validation metrics of the clients that have finished training in the round after ``round``.
        privacy: guarantee of what each of them trained, where there is one.
        dropped: clients that dropped out of that round.
        versions: round whose global teacher a client holds.
        rounds_done: rounds a client has trained in.
        phases: local phases a client has finished.
    """

    step: int = 0
    round: int = 0
    exchanged: int | None = None
    trained: dict[str, dict[str, float]] = field(default_factory=dict)
    privacy: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    rounds_done: dict[str, int] = field(default_factory=dict)
    phases: dict[str, list[str]] = field(default_factory=dict)


class FederatedLoop:
    """Drives clients and server through a :class:`Federation`.

    Args:
        federation: the schedule.
        clients: by name; at least one.
        callbacks: hooks; those that are not :class:`~lightning_sfubm.federated.hooks.FederatedCallback` are ignored.
        run_dir: where checkpoints, the message ledger and the history are written.
        seed: root seed.
        loggers: experiment loggers that callbacks may write to.
    """

    def __init__(
        self,
        federation: Federation,
        clients: dict[str, Client],
        callbacks: Iterable[object],
        run_dir: Path,
        seed: int,
        loggers: Iterable[Logger] = (),
    ) -> None:
        if not clients:
            raise ConfigError("a federation needs at least one client: give data.domains at least one domain")
        federation.check_clients(clients)
        if federation.sends_teacher and len(clients) > 1:
            federation.weights.check_clients(federation.smallest_round(clients))
        self.federation, self.clients = federation, dict(sorted(clients.items()))
        callbacks = list(callbacks)
        self.callbacks = [c for c in callbacks if isinstance(c, FederatedCallback)]
        self._private = any(getattr(c, "makes_private", False) for c in callbacks)
        if self._private and federation.weighting == "examples":
            raise PrivacyError(
                "weighting 'examples' discloses numbers of interactions that differential privacy does not cover: set it to "
                "'uniform'"
            )
        self.run_dir, self.seed = run_dir, seed
        #: whether this is a run cut off before its first state: what it had sent stays in the ledger
        self.goes_on = False
        self.loggers = list(loggers)
        self.counters = Counters()
        self.workers: WorkerPool | None = None
        self._pieces = 0  # of work since the last whole state
        self.stopwatch = Stopwatch()
        self.ledger = Ledger(
            run_dir / "ledger.jsonl", MessageStore(run_dir / FOLDER) if federation.keep_messages else None
        )
        first = next(iter(self.clients.values())).module
        self.server = Server(
            federation.aggregator,
            dim=first.semantics().shape[1],
            teacher=first.shared_state() if federation.sends_teacher else None,
            weights=copy.deepcopy(federation.weights),  # it may keep state, and settings outlive a run
            # under secure aggregation no message carries a number of examples
            weighting="uniform" if federation.secure_aggregation else federation.weighting,
        )

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's states."""
        return self.run_dir / "checkpoints"

    @property
    def shares_teacher(self) -> bool:
        """Whether what a round trains leaves the client."""
        return self.federation.sends_teacher and len(self.clients) > 1

    def resume(self, path: Path) -> None:
        """Go on from the newest whole state under ``path``. The history is cut back to it; the ledger is never cut.

        Raises:
            CheckpointError: none is whole, or it belongs to another model, other clients or another schedule.
        """
        stored = load_state(find_state(path), self.server, self.clients)
        if stored["schedule"] != self.federation.schedule(self.seed):
            raise CheckpointError(
                f"{path}: was written by the schedule {stored['schedule']}, this run has {self.federation.schedule(self.seed)}"
            )
        self.counters = Counters(**stored["counters"])
        for name, client in self.clients.items():
            client.phases_done = list(self.counters.phases.get(name, []))
            client.rounds_done = self.counters.rounds_done.get(name, 0)
        for callback in self.callbacks:
            if callback.state_key in stored["callbacks"]:
                callback.load_state_dict(stored["callbacks"][callback.state_key])
        history = self.run_dir / "history.jsonl"
        kept = history.read_text().splitlines(keepends=True)[: stored["history"]] if stored["history"] else []
        write_atomically(history, "".join(kept).encode())
        self.ledger.resume(stored["ledger"])

    def run(self) -> None:
        """Run to the end from wherever the counters stand."""
        try:
            self._run()
        finally:
            if self.workers is not None:
                self.workers.close()

    def _run(self) -> None:
        federation = self.federation
        if self.counters.step == 0:
            self._start()
        if self.counters.exchanged is None and len(federation.active(self.clients, 0)) > 1:
            self._exchange_semantics(0)
        for number in range(self.counters.round + 1, federation.rounds + 1):
            self._round(number)
        todo = [(n, p) for n, c in self.clients.items() for p in c.module.local_phases if p not in c.phases_done]
        if self.workers is not None:
            for number, (name, phase) in enumerate(todo):
                self._submit(name, self._phase_arguments(phase), first=number == 0 or todo[number - 1][0] != name)
        for number, (name, phase) in enumerate(todo, 1):
            with self.stopwatch(f"stage 1: local {phase}"):
                self._local_phase(name, self.clients[name], phase, last=number == len(todo))
        for client in self.clients.values():
            client.finish()

    def _start(self) -> None:
        """Clear the place of an earlier run, its states first and at once: half of them must not be gone on from."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        earlier = self.run_dir / ".earlier"
        if self.checkpoints.exists():
            if earlier.exists():
                shutil.rmtree(earlier)
            self.checkpoints.replace(earlier)
        for folder in ("clients", "csv", FOLDER):
            shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        (self.run_dir / "audit.json").unlink(missing_ok=True)
        (self.run_dir / "history.jsonl").write_text("")
        if self.goes_on and not earlier.exists():
            self.ledger.resume(0)
        else:
            self.ledger.start()
        shutil.rmtree(earlier, ignore_errors=True)

    # ------------------------------------------------------------------ item semantics

    def _exchange_semantics(self, round: int) -> None:
        if not self.federation.sends_semantics:
            return
        with self.stopwatch("stage 1: semantics exchange"):
            self.exchange_semantics(round)
        self._checkpoint()

    def exchange_semantics(self, round: int = 0) -> None:
        """Perturbed item vectors up, aggregated vectors down, among the clients of a round.

        Raises:
            PrivacyError: no callback protects item semantics. Add ``PrivacyNoise``; sigma 0 must be asked for.
        """
        self._check_protected()
        schema, uploads = self.server.semantics, {}
        for name in self.federation.active(self.clients, round):
            try:
                uploads[name] = self._send(name, schema, round, {"vectors": self.clients[name].semantics()})
            except ClientDropped as error:
                log.warning("exchange of semantics: client '%s' dropped out (%s)", name, error)
        for name, answer in self.server.aggregate_semantics(round, uploads).items():
            self.clients[name].receive_semantics(self._receive(name, schema, answer)["vectors"])
        self.counters.exchanged = round

    def _check_protected(self) -> None:
        if not any("semantics" in c.protects for c in self.callbacks):
            raise PrivacyError(
                "item semantics would leave unprotected: add lightning_sfubm.callbacks.privacy_noise.PrivacyNoise to "
                "trainer.callbacks (its sigma may be 0), or set exchange to 'teacher' or 'nothing'"
            )

    # ------------------------------------------------------------------ rounds

    def _round(self, number: int) -> None:
        federation, counters = self.federation, self.counters
        if federation.joined(self.clients, number) and counters.exchanged != number:
            self._exchange_semantics(number)
        for callback in self.callbacks:
            callback.on_round_start(self, number)
        drawn = federation.sample(self.clients, number, self.seed)
        todo = [name for name in drawn if name not in counters.trained and name not in counters.dropped]
        if self.workers is not None:
            for name in todo:
                if self._begin(name, number):
                    self._submit(name, self._round_arguments(name, number), first=True)
        for name in todo:
            with self.stopwatch("stage 1: rounds, local training"):
                self._train(name, number)
            with self.stopwatch("stage 1: checkpoints"):
                self._checkpoint()
        metrics = dict(counters.trained)
        with self.stopwatch("stage 1: rounds, messages and aggregation"):
            if self.shares_teacher:
                self._exchange_teacher(number)
            for callback in self.callbacks:
                callback.on_aggregate(self, number)
        counters.round, counters.trained, counters.privacy, counters.dropped = number, {}, {}, []
        with self.stopwatch("stage 1: checkpoints"):
            self._checkpoint()
        for callback in self.callbacks:
            callback.on_round_end(self, number, metrics)

    def _begin(self, name: str, number: int) -> bool:
        """Before a client trains in a round; whether it is there. One that drops out is noted and left as it was."""
        try:
            for callback in self.callbacks:
                callback.on_client_start(self, name, number)
        except ClientDropped as error:
            self._drop(name, number, error)
            return False
        self._catch_up(name)
        return True

    def _train(self, name: str, number: int) -> None:
        """One client's share of a round."""
        client = self.clients[name]
        if self.workers is not None:
            if name in self.counters.dropped:
                return
            answer = self._collect(name, client.module.round_phase, number)
            client.metrics, client.privacy = answer.metrics, answer.privacy
            client.rounds_done += 1
        elif self._begin(name, number):
            record = partial(self._history, name, client.module.round_phase, number)
            client.train_round(folder=self._folder(name), record=record, **self._round_arguments(name, number))
        else:
            return
        self.counters.trained[name] = client.metrics
        if client.privacy is not None:
            self.counters.privacy[name] = client.privacy
        self.counters.rounds_done[name] = client.rounds_done

    def _round_arguments(self, name: str, number: int) -> dict[str, Any]:
        return {
            "round": number,
            "rounds": self.federation.rounds,
            "epochs": self.federation.epochs(name),
            "shares": self.shares_teacher,
        }

    def _submit(self, name: str, arguments: dict[str, Any], first: bool) -> None:
        """Give a worker a client's training; the state it starts from goes along, but for further phases in a row."""
        assert self.workers is not None
        client, folder = self.clients[name], self._folder(name)
        state = folder / "sent.ckpt"  # a name of its own: files of states come and go
        if first:
            client.save(state, link=True)
        job = Job(name, arguments, str(folder), str(state) if first else None, client.rounds_done)
        self.workers.submit(job)

    def _collect(self, name: str, phase: str, number: int | None) -> Trained:
        assert self.workers is not None
        answer = self.workers.result(name)
        self.clients[name].take_over(Path(answer.file), answer.cpu_s)
        for epoch, metrics in answer.epochs:
            self._history(name, phase, number, epoch, metrics)
        for logger in self.loggers:
            for entry in answer.logged:
                logger.log_metrics(entry)
        return answer

    def _drop(self, name: str, number: int, error: ClientDropped) -> None:
        log.warning("round %d: client '%s' dropped out (%s)", number, name, error)
        self.counters.trained.pop(name, None)
        self.counters.dropped.append(name)

    def _exchange_teacher(self, number: int) -> None:
        schema = self.server.teacher
        if schema is None:
            raise ConfigError("this server was built without a teacher to exchange")
        self._check_guarantees(number)
        arrived = self._aggregate_securely if self.federation.secure_aggregation else self._aggregate
        try:
            names = arrived(number, schema)
        except (TooFewClientsError, PrivacyError) as error:
            log.warning("round %d: %s The global teacher stays as it was.", number, error)
            names = sorted(self.counters.trained)
        for name in self.clients if number == self.federation.rounds else names:
            self._catch_up(name)

    def _check_guarantees(self, number: int) -> None:
        unprotected = [name for name in self.counters.trained if name not in self.counters.privacy]
        if self._private and unprotected:
            raise PrivacyError(
                f"round {number}: the run asks for differential privacy, but what {unprotected} trained has no guarantee; "
                "nothing is sent. Give every client the callback DifferentialPrivacy"
            )

    def _update(self, name: str) -> dict[str, Tensor]:
        """What a client has trained, as it is sent where every update travels in a message of its own."""
        tensors = self.clients[name].module.shared_state()
        if self.federation.weighting == "examples":
            tensors["__weight__"] = Tensor([self.clients[name].num_examples])
        return tensors

    def _aggregate(self, number: int, schema: MessageSchema) -> list[str]:
        """Updates up, each in a message of its own; returns whose arrived."""
        payloads = {}
        for name in sorted(self.counters.trained):
            try:
                payloads[name] = self._send(name, schema, number, self._update(name))
            except ClientDropped as error:
                self._drop(name, number, error)
        self._check_updates(len(payloads))
        self.server.aggregate_teacher(number, payloads)
        return list(payloads)

    def _aggregate_securely(self, number: int, schema: MessageSchema) -> list[str]:
        """Masked updates up: the server learns their mean; returns whose arrived."""
        secure = self.federation.secure_aggregation
        assert secure is not None
        updates: dict[str, dict[str, Tensor]] = {}
        mechanisms: dict[str, dict[str, object]] = {}
        for name in sorted(self.counters.trained):
            try:
                tensors, mechanisms[name] = self._protect(name, schema.kind, self.clients[name].module.shared_state())
                updates[name] = pack(schema, name, number, tensors).tensors  # checked as if it were sent
            except ClientDropped as error:
                self._drop(name, number, error)
        self._check_updates(len(updates))
        weights = None
        if self.federation.weighting == "examples":
            weights = {name: float(self.clients[name].num_examples) for name in updates}

        def record(client: str, direction: str, kind: str, payload: bytes) -> None:
            masked = {**mechanisms[client], "secure aggregation": f"threshold {secure.threshold:g}"}
            about = masked if direction == "up" else {}
            self.ledger.record_bytes(client, direction, kind, number, payload, about)

        self.server.take_mean(number, secure.mean(number, updates, weights, record))
        return list(updates)

    def _check_updates(self, count: int) -> None:
        if count < self.federation.min_updates:
            raise TooFewClientsError(f"{count} updates arrived, {self.federation.min_updates} are needed.")

    def _catch_up(self, name: str) -> None:
        """Give a client the current global teacher unless it holds it, or has left for good."""
        server, versions = self.server, self.counters.versions
        left = self.federation.leaves.get(name, self.counters.round + 1) <= self.counters.round
        if not server.version or versions.get(name, 0) == server.version or left:
            return
        assert server.broadcast_schema is not None
        received = self._receive(name, server.broadcast_schema, server.broadcast())
        self.clients[name].receive_teacher(received)
        versions[name] = server.version

    def _phase_arguments(self, phase: str) -> dict[str, Any]:
        federation = self.federation
        return {
            "phase": phase,
            "max_epochs": federation.local_max_epochs,
            "min_epochs": federation.local_min_epochs,
            "patience": federation.patience,
            "monitor": federation.monitor,
        }

    def _local_phase(self, name: str, client: Client, phase: str, last: bool) -> None:
        if self.workers is None:
            record = partial(self._history, name, phase, None)
            best = client.train_phase(folder=self._folder(name), record=record, **self._phase_arguments(phase))
        else:
            best = self._collect(name, phase, None).best
            client.phases_done.append(phase)
        self.counters.phases[name] = list(client.phases_done)
        self._checkpoint(last)
        for callback in self.callbacks:
            callback.on_phase_end(self, name, phase, best)

    # ------------------------------------------------------------------ messages and files

    def _send(self, name: str, schema: MessageSchema, round: int, tensors: dict[str, Tensor]) -> bytes:
        tensors, mechanism = self._protect(name, schema.kind, tensors)
        message = pack(schema, name, round, tensors)
        self.ledger.record(name, "up", message, mechanism)
        return message.payload

    def _protect(self, name: str, kind: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
        """What the callbacks make of a client's tensors before they leave, and the mechanisms applied."""
        mechanism: dict[str, object] = {}
        if kind == "teacher" and name in self.counters.privacy:
            mechanism["differential privacy"] = self.counters.privacy[name]
        for callback in self.callbacks:
            tensors = callback.on_upload(self, name, kind, tensors)
            mechanism |= callback.describe_upload(kind)
        return tensors, mechanism

    def _receive(self, name: str, schema: MessageSchema, message: Message) -> dict[str, Tensor]:
        received = unpack(schema, message.payload)
        self.ledger.record(name, "down", message, {})
        return received.tensors

    def _history(self, client: str, phase: str, round: int | None, epoch: int, metrics: dict[str, float]) -> None:
        entry = {"client": client, "phase": phase, "round": round, "epoch": epoch, "metrics": metrics}
        with open(self.run_dir / "history.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def _folder(self, client: str) -> Path:
        return self.run_dir / "clients" / client

    def _checkpoint(self, last: bool = False) -> None:
        """Write a state: a whole one at the end and once for as many pieces of work as there are clients."""
        self.counters.step += 1
        self._pieces = 0 if last or self._pieces + 1 >= len(self.clients) else self._pieces + 1
        with open(self.run_dir / "history.jsonl", "rb") as handle:
            lines = sum(1 for _ in handle)
        stored: dict[str, Any] = {
            "counters": vars(self.counters),
            "schedule": self.federation.schedule(self.seed),
            "callbacks": {c.state_key: state for c in self.callbacks if (state := c.state_dict())},
            "history": lines,
            "ledger": self.ledger.entries,
        }
        save_state(self.checkpoints, self.counters.step, stored, self.server, self.clients, self._pieces > 0)
