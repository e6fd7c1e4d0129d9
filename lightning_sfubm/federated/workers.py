"""Clients trained side by side: worker processes that live as long as the run, each with its own clients.

A worker is given a client's state as a file, trains one round or one local phase, and answers with a file; the loop in the
parent process keeps all state, so that messages, checkpoints and resume are as without workers. A worker that ends on its own
(killed, out of memory) ends the run with an error: its client does not count as dropped out, since the run that goes on from
the last state must come out as if nothing had happened. No worker outlives its parent.

Workers are forks of one process that has imported the package and done nothing else: imports take seconds, and are paid for
once, while the parent still reads its data.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger

from lightning_sfubm import errors
from lightning_sfubm.errors import SFUBMError

_IMPORTS = [
    "lightning_sfubm.federated.trainer",
    "lightning_sfubm.modules.fkd",
    "lightning_sfubm.datamodules.domain_datamodule",
]
_AHEAD = 2  # jobs a worker is given before it has answered: it need not wait while the parent writes a state


class WorkerError(SFUBMError):
    """A worker process ended while it trained a client."""


@dataclass(frozen=True)
class Job:
    """One piece of training.

    Attributes:
        client: whose.
        arguments: of ``Client.train_round``, or of ``Client.train_phase`` where there is a ``phase`` among them; JSON values.
        folder: the client's own.
        state: file to start from; ``None`` = go on from this worker's piece before for the same client.
        rounds_done: rounds the client has trained in.
    """

    client: str
    arguments: dict[str, Any]
    folder: str
    state: str | None
    rounds_done: int


@dataclass
class Trained:
    """A worker's answer: the file with what was trained, and what the parent cannot read from it."""

    file: str
    cpu_s: float
    metrics: dict[str, float]
    privacy: dict[str, Any] | None
    best: float
    epochs: list[tuple[int, dict[str, float]]]
    logged: list[dict[str, float]]


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    queue: deque[Job] = field(default_factory=deque)
    running: deque[Job] = field(default_factory=deque)


def import_ahead() -> None:
    """Start the process that workers are forked from, which imports the package meanwhile; at once where it runs already."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTS)
    forkserver.ensure_running()


class WorkerPool:
    """The workers of a run, started with the first job.

    Args:
        count: processes at most; never more than clients.
        template: module that every client starts as.
        domains: data module by client.
        flags: of the trainer, less its loggers.
        seed: root seed.
    """

    def __init__(
        self, count: int, template: LightningModule, domains: Mapping[str, Any], flags: dict[str, Any], seed: int
    ) -> None:
        self._template, self._domains, self._flags, self._seed = template, dict(domains), flags, seed
        self._count = min(count, len(self._domains))
        self._workers: list[_Worker] = []
        self._answers: dict[str, deque[Trained]] = {name: deque() for name in self._domains}

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, job: Job) -> None:
        """Queue a job; jobs of a client are done in the order they come."""
        if not self._workers:
            self._start()
        worker = self._workers[sorted(self._domains).index(job.client) % self._count]
        worker.queue.append(job)
        self._feed(worker)

    def result(self, client: str) -> Trained:
        """Wait for the client's next answer.

        Raises:
            WorkerError: a worker process ended.
            SFUBMError: as the client's training raised it.
            RuntimeError: another error, with the worker's traceback.
        """
        while not self._answers[client]:
            owners: dict[Any, _Worker] = {w.pipe: w for w in self._workers} | {
                w.process.sentinel: w for w in self._workers
            }
            for ready in wait(list(owners)):
                self._receive(owners[ready])
        return self._answers[client].popleft()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _start(self) -> None:
        import_ahead()
        context = multiprocessing.get_context("forkserver")
        names = sorted(self._domains)
        for number in range(self._count):
            ours, theirs = context.Pipe()
            domains = {name: self._domains[name].unloaded() for name in names[number :: self._count]}
            arguments = (theirs, dict(os.environ))
            process = context.Process(target=serve, args=arguments, daemon=True, name=f"clients {number}")
            process.start()
            theirs.close()
            # Not as an argument: the first process passes 256 file descriptors at most, and each tensor is one.
            ours.send((self._template, domains, self._flags, self._seed))
            self._workers.append(_Worker(process, ours))

    def _feed(self, worker: _Worker) -> None:
        while worker.queue and len(worker.running) < _AHEAD:
            job = worker.queue.popleft()
            worker.running.append(job)
            try:
                worker.pipe.send(job)
            except OSError:
                self._ended(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            if not worker.pipe.poll():
                if not worker.process.is_alive():
                    self._ended(worker)
                return
            kind, answer = worker.pipe.recv()
        except (EOFError, OSError):
            self._ended(worker)
        job = worker.running.popleft()
        if kind == "failed":
            name, message, trace = answer
            error = getattr(errors, name, None)
            if error is not None:
                raise error(f"client '{job.client}': {message}")
            raise RuntimeError(f"the worker of client '{job.client}' failed:\n{trace}")
        self._answers[job.client].append(answer)
        self._feed(worker)

    def _ended(self, worker: _Worker) -> None:
        worker.process.join()
        clients = ", ".join(dict.fromkeys(f"'{job.client}'" for job in worker.running)) or "none"
        raise WorkerError(
            f"a worker process ended with exit code {worker.process.exitcode} (its clients at work: {clients}); what was "
            "trained before is kept: go on with --ckpt_path last"
        )


class Recorder(Logger):
    """Keeps what clients log in a worker, for the loggers of the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        """Fixed."""
        return "recorder"

    @property
    def version(self) -> int:
        """Fixed."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them."""
        self.entries.append({name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the parent knows them."""

    def drain(self) -> list[dict[str, float]]:
        """What was logged since the last call."""
        entries, self.entries = self.entries, []
        return entries


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Body of a worker process: train what comes through the pipe until it is closed.

    Args:
        pipe: brings template, domains, flags and seed of a :class:`WorkerPool` first, then jobs; takes the answers.
        environment: the parent's, which may have changed since the process that workers are forked from was started.
    """
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    from lightning_sfubm.federated.federation import Federation
    from lightning_sfubm.federated.trainer import FederatedTrainer

    template, domains, flags, seed = pipe.recv()
    recorder = Recorder()
    trainer = FederatedTrainer(federation=Federation(), logger=recorder, **flags)
    clients: dict[str, Any] = {}
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", _train(job, trainer, recorder, clients, template, domains, seed)))
        except Exception as error:
            name = type(error).__name__ if isinstance(error, SFUBMError) else ""
            pipe.send(("failed", (name, str(error), traceback.format_exc())))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(
    job: Job,
    trainer: Any,
    recorder: Recorder,
    clients: dict[str, Any],
    template: LightningModule,
    domains: dict,
    seed: int,
) -> Trained:
    client = clients.get(job.client)
    if client is None:
        client = clients[job.client] = trainer.make_client(job.client, template, domains[job.client], seed)
    if job.state is not None:
        client.load(Path(job.state))
        client.rounds_done = job.rounds_done
    before, folder, best = client.train_cpu_s or 0.0, Path(job.folder), float("nan")
    epochs: list[tuple[int, dict[str, float]]] = []

    def record(epoch: int, metrics: dict[str, float]) -> None:
        epochs.append((epoch, metrics))

    if "phase" in job.arguments:
        best = client.train_phase(folder=folder, record=record, **job.arguments)
        file = folder / f"trained-{job.arguments['phase']}.ckpt"  # the next phase must not write over it
    else:
        client.train_round(folder=folder, record=record, **job.arguments)
        file = folder / "trained-round.ckpt"
    client.saved = client.saved.replace(file)
    cpu_s = client.train_cpu_s - before
    return Trained(str(file), cpu_s, client.metrics, client.privacy, best, epochs, recorder.drain())
