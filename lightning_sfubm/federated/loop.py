"""The federated loop: rounds over clients, then local training to early stopping.

    for each round:   every client trains E epochs  ->  shared weights up  ->  server averages  ->  shared weights down
    before the first: item semantics up (perturbed by a callback)  ->  server mixes  ->  global views down
    after the last:   every client trains its local phases (teacher, then student) to early stopping on validation

Item vectors are frozen, so one exchange before the first round says all there is to say; sending them again would send
the same bytes. All state lives in the checkpoint of :mod:`lightning_sfubm.federated.checkpoint`.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_sfubm.errors import CheckpointError, ConfigError, PrivacyError
from lightning_sfubm.federated.aggregation import KNNMix, NoAggregation, SemanticAggregator
from lightning_sfubm.federated.checkpoint import find_state, load_state, save_state
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.messages import Message, pack, unpack
from lightning_sfubm.federated.server import Server
from lightning_sfubm.training import Stopwatch

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
        weighting: of FedAvg; ``"examples"`` discloses each client's number of training interactions.
        local_max_epochs: bound of each local phase after the rounds.
        local_min_epochs: epochs before which a local phase does not stop.
        patience: epochs without improvement of ``monitor`` that end a local phase.
        monitor: validation metric of the local phases.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        rounds: int = 5,
        local_epochs: int = 1,
        exchange: Exchange = "semantics",
        aggregator: SemanticAggregator | None = None,
        weighting: Literal["uniform", "examples"] = "uniform",
        local_max_epochs: int = 60,
        local_min_epochs: int = 8,
        patience: int = 5,
        monitor: str = "val/ndcg@10",
    ) -> None:
        if rounds < 0 or local_epochs < 1 or patience < 1 or not 1 <= local_min_epochs <= local_max_epochs:
            raise ConfigError(
                f"federation: rounds = {rounds} (>= 0), local_epochs = {local_epochs} (>= 1), patience = {patience} (>= 1), "
                f"1 <= local_min_epochs = {local_min_epochs} <= local_max_epochs = {local_max_epochs} is required"
            )
        self.rounds, self.local_epochs, self.exchange, self.weighting = rounds, local_epochs, exchange, weighting
        self.aggregator: SemanticAggregator = aggregator if aggregator is not None else KNNMix()
        self.local_max_epochs, self.local_min_epochs = local_max_epochs, local_min_epochs
        self.patience, self.monitor = patience, monitor

    @property
    def sends_semantics(self) -> bool:
        """Whether item vectors travel."""
        return self.exchange in ("semantics", "both") and not isinstance(self.aggregator, NoAggregation)

    @property
    def sends_teacher(self) -> bool:
        """Whether teacher weights travel."""
        return self.exchange in ("teacher", "both")


@dataclass
class Counters:
    """Where a run stands."""

    step: int = 0
    round: int = 0
    semantics_done: bool = False
    phases: dict[str, list[str]] | None = None


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
        self.federation, self.clients = federation, dict(sorted(clients.items()))
        self.callbacks = [c for c in callbacks if isinstance(c, FederatedCallback)]
        self.run_dir, self.seed = run_dir, seed
        self.loggers = list(loggers)
        self.counters = Counters()
        self.stopwatch = Stopwatch()
        first = next(iter(self.clients.values())).module
        self.server = Server(
            federation.aggregator,
            dim=first.semantics().shape[1],
            teacher=first.shared_state() if federation.sends_teacher else None,
            weighting=federation.weighting,
        )

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's states."""
        return self.run_dir / "checkpoints"

    def resume(self, path: Path) -> None:
        """Go on from the newest whole state under ``path``; history and ledger are cut back to it.

        Raises:
            CheckpointError: none is whole, or it belongs to another model, other clients or another schedule.
        """
        counters = load_state(find_state(path), self.server, self.clients)
        schedule = counters.pop("schedule")
        if schedule != self._schedule():
            raise CheckpointError(f"{path}: was written by the schedule {schedule}, this run has {self._schedule()}")
        lines = counters.pop("lines")
        self.counters = Counters(**counters)
        for name, phases in (self.counters.phases or {}).items():
            self.clients[name].phases_done = list(phases)
        for file, count in lines.items():
            kept = (self.run_dir / file).read_text().splitlines(keepends=True)[:count] if count else []
            (self.run_dir / file).write_text("".join(kept))

    def run(self) -> None:
        """Run to the end from wherever the counters stand. Writes a checkpoint after each round and local phase."""
        federation = self.federation
        if self.counters.step == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            for folder in ("checkpoints", "clients", "csv"):  # of an earlier run in the same place
                shutil.rmtree(self.run_dir / folder, ignore_errors=True)
            for file in ("history.jsonl", "ledger.jsonl"):
                (self.run_dir / file).write_text("")
        if federation.sends_semantics and len(self.clients) > 1 and not self.counters.semantics_done:
            with self.stopwatch("stage 1: semantics exchange"):
                self.exchange_semantics()
        for number in range(self.counters.round + 1, federation.rounds + 1):
            self._round(number)
        for name, client in self.clients.items():
            for phase in client.module.local_phases:
                if phase not in client.phases_done:
                    with self.stopwatch(f"stage 1: local {phase}"):
                        self._local_phase(name, client, phase)
            client.finish()

    def exchange_semantics(self) -> None:
        """Perturbed item vectors up, aggregated vectors down.

        Raises:
            PrivacyError: no callback protects item semantics. Add ``PrivacyNoise``; sigma 0 must be asked for.
        """
        if not any("semantics" in c.protects for c in self.callbacks):
            raise PrivacyError(
                "item semantics would leave unprotected: add lightning_sfubm.callbacks.privacy_noise.PrivacyNoise to "
                "trainer.callbacks (its sigma may be 0), or set exchange to 'teacher' or 'nothing'"
            )
        schema = self.server.semantics
        uploads = {n: self._send(n, c, schema, 0, {"vectors": c.semantics()}) for n, c in self.clients.items()}
        for name, answer in self.server.aggregate_semantics(0, uploads).items():
            received = self._receive(name, schema, answer)
            self.clients[name].receive_semantics(received["vectors"])
        self.counters.semantics_done = True

    def _round(self, number: int) -> None:
        federation, metrics = self.federation, {}
        for callback in self.callbacks:
            callback.on_round_start(self, number)
        for name, client in self.clients.items():
            with self.stopwatch("stage 1: rounds, local training"):
                client.train_round(
                    number,
                    federation.rounds,
                    federation.local_epochs,
                    client.saved if number > 1 else None,
                    self._folder(name),
                    partial(self._history, name, client.module.round_phase, number),
                )
            metrics[name] = client.metrics
        with self.stopwatch("stage 1: rounds, messages and aggregation"):
            if federation.sends_teacher and len(self.clients) > 1:
                self._exchange_teacher(number)
            for callback in self.callbacks:
                callback.on_aggregate(self, number)
        self.counters.round = number
        with self.stopwatch("stage 1: checkpoints"):
            self._checkpoint()
        for callback in self.callbacks:
            callback.on_round_end(self, number, metrics)

    def _exchange_teacher(self, number: int) -> None:
        schema = self.server.teacher
        if schema is None or self.server.broadcast_schema is None:
            raise ConfigError("this server was built without a teacher to exchange")
        payloads = {}
        for name, client in self.clients.items():
            tensors = client.module.shared_state()
            if self.federation.weighting == "examples":
                tensors["__weight__"] = Tensor([client.num_examples])
            payloads[name] = self._send(name, client, schema, number, tensors)
        answer = self.server.aggregate_teacher(number, payloads)
        if answer is None:
            log.warning("round %d: no teacher arrived, the global teacher stays as it was", number)
            return
        for name, client in self.clients.items():
            client.module.load_shared_state(self._receive(name, self.server.broadcast_schema, answer))

    def _local_phase(self, name: str, client: Client, phase: str) -> None:
        best = client.train_phase(
            phase,
            self._folder(name),
            partial(self._history, name, phase, None),
            max_epochs=self.federation.local_max_epochs,
            min_epochs=self.federation.local_min_epochs,
            patience=self.federation.patience,
            monitor=self.federation.monitor,
        )
        self.counters.phases = {n: list(c.phases_done) for n, c in self.clients.items()}
        self._checkpoint()
        for callback in self.callbacks:
            callback.on_phase_end(self, name, phase, best)

    def _send(self, name: str, client: Client, schema: Any, round: int, tensors: dict[str, Tensor]) -> bytes:
        mechanism: dict[str, object] = {}
        for callback in self.callbacks:
            tensors = callback.on_upload(self, name, schema.kind, tensors)
            mechanism |= callback.describe_upload(schema.kind)
        message = pack(schema, name, round, tensors)
        self._ledger(name, "up", message, mechanism)
        return message.payload

    def _receive(self, name: str, schema: Any, message: Message) -> dict[str, Tensor]:
        received = unpack(schema, message.payload)
        self._ledger(name, "down", message, {})
        return received.tensors

    def _ledger(self, client: str, direction: str, message: Message, mechanism: dict[str, object]) -> None:
        tensors = {n: {"shape": list(t.shape), "dtype": "float32"} for n, t in message.tensors.items()}
        entry = {
            "round": message.round,
            "client": client,
            "direction": direction,
            "kind": message.kind,
            "bytes": len(message.payload),
            "tensors": tensors,
            "sha256": message.sha256,
            "mechanism": mechanism,
        }
        self._append("ledger.jsonl", entry)

    def _history(self, client: str, phase: str, round: int | None, epoch: int, metrics: dict[str, float]) -> None:
        entry: dict[str, object] = {
            "client": client,
            "phase": phase,
            "round": round,
            "epoch": epoch,
            "metrics": metrics,
        }
        self._append("history.jsonl", entry)

    def _append(self, file: str, entry: dict[str, object]) -> None:
        with open(self.run_dir / file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def _folder(self, client: str) -> Path:
        return self.run_dir / "clients" / client

    def _schedule(self) -> dict[str, object]:
        federation = self.federation
        return {"local_epochs": federation.local_epochs, "exchange": federation.exchange, "seed": self.seed}

    def _checkpoint(self) -> None:
        self.counters.step += 1
        lines = {}
        for file in ("history.jsonl", "ledger.jsonl"):
            with open(self.run_dir / file, "rb") as handle:
                lines[file] = sum(1 for _ in handle)
        counters = {**vars(self.counters), "lines": lines, "schedule": self._schedule()}
        save_state(self.checkpoints, self.counters.step, counters, self.server, self.clients)
