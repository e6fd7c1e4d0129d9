"""The federated loop: rounds over clients, then local training to early stopping.

    before the first: item semantics up (perturbed by a callback)  ->  server mixes  ->  global views down
    for every round:  the clients drawn for it train E epochs  ->  shared weights up  ->  server aggregates  ->  down
    after the last:   every client trains its local phases (teacher, then student) to early stopping on validation

Item vectors are frozen, so one exchange says all there is to say; it is repeated only when a client joins later. The loop
writes its state (:mod:`lightning_sfubm.federated.checkpoint`) after every piece of work: the exchange, each client's local
training, each aggregation, each local phase. Every piece draws from streams named after it, so one that was cut off is
done again from the state before it and comes out the same, bit for bit.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.federated.checkpoint import state_folder
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.exchange import Exchange
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import ClientDropped
from lightning_sfubm.federated.ledger import content_hash
from lightning_sfubm.federated.state import OF_SILO, Counters
from lightning_sfubm.federated.workers import Job, Trained
from lightning_sfubm.ranks import is_first, wait_for_all

log = logging.getLogger(__name__)

__all__ = ["Counters", "FederatedLoop", "Federation", "refuse_folder_of_silo"]


def refuse_folder_of_silo(run_dir: Path) -> None:
    """Refuse to begin a run where a silo keeps its part of one.

    Raises:
        ConfigError: the folder is a silo's.
    """
    if (run_dir / OF_SILO).exists():
        raise ConfigError(
            f"{run_dir} holds a silo's part of a federated run and the record of what left it, which a run from "
            "the beginning would clear: go on from it by --ckpt_path last, or give another trainer.default_root_dir"
        )


class FederatedLoop(Exchange):
    """Drives clients and server through a :class:`Federation`: rounds, then local training to early stopping.

    Args:
        federation: the schedule.
        clients: by name; at least one.
        callbacks: hooks; those that are not :class:`~lightning_sfubm.federated.hooks.FederatedCallback` are ignored.
        run_dir: where checkpoints, the message ledger and the history are written.
        seed: root seed.
        loggers: experiment loggers that callbacks may write to.
    """

    def states(self, ckpt_path: str | Path) -> Path:
        """Where the states of a ``ckpt_path`` are: this run's for ``"last"``."""
        return self.checkpoints if str(ckpt_path) == "last" else Path(ckpt_path)

    def go_on(self, ckpt_path: str | Path) -> None:
        """Go on from a state. A run that was cut off before it wrote its first one starts from the beginning.

        Raises:
            CheckpointError: see :meth:`resume`; or the schedule has fewer rounds than are done, or more than the local
                phases follow; or the rounds of a silo are not over.
            PrivacyError: the secrets are not those that the run was begun with.
        """
        states = self.states(ckpt_path)
        fresh = str(ckpt_path) == "last" and not any(states.glob("state-*"))
        wait_for_all()  # all have looked before the first writes
        if fresh:
            log.warning("%s holds no state yet: the run starts from the beginning", states)
            self.check_begun()
            self.goes_on = True
            return
        self.resume(states)
        done = self.counters.round
        if done > self.federation.rounds:
            raise CheckpointError(
                f"{states}: has {done} rounds behind it, trainer.federation.rounds asks for {self.federation.rounds}: set "
                f"it to {done} or more, or start anew in another trainer.default_root_dir"
            )
        if any(self.counters.phases.values()) and done < self.federation.rounds:
            raise CheckpointError(
                f"{states}: the local phases there follow {done} rounds and would not learn from more: set "
                f"trainer.federation.rounds to {done}, or start anew in another trainer.default_root_dir"
            )
        if (
            (self.run_dir / OF_SILO).exists()
            and done < self.federation.rounds
            and not any(self.counters.phases.values())
        ):
            raise CheckpointError(
                f"{states}: the {self.federation.rounds} rounds of a federated run are not over, and the rest would be trained "
                "here alone: let the coordinator finish the run, or start anew in another trainer.default_root_dir"
            )
        finished = sum(len(phases) for phases in self.counters.phases.values())
        phases = sum(len(client.module.local_phases) for client in self.clients.values())
        Console(highlight=False, quiet=not is_first()).print(
            f"Goes on from {state_folder(self.checkpoints, self.counters.step).name}: {done} of {self.federation.rounds} "
            f"rounds and {finished} of {phases} local phases are done"
        )

    def check_start(self) -> None:
        """Refuse a run from the beginning that is sure to end at its first step: it would have cleared an earlier one's place.

        Raises:
            ConfigError: the folder is a silo's.
            PrivacyError: see :meth:`check_exchange`.
            MessageError: likewise.
        """
        if self.counters.step == 0:
            refuse_folder_of_silo(self.run_dir)
            self.check_exchange()

    def run(self) -> None:
        """Run to the end from wherever the counters stand."""
        try:
            self._run()
        finally:
            if self.workers is not None:
                self.workers.close()

    def _run(self) -> None:
        federation = self.federation
        self.check_start()
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

    def _round(self, number: int) -> None:
        federation, counters = self.federation, self.counters
        if federation.joined(self.clients, number) and counters.exchanged != number:
            self._exchange_semantics(number)
        for callback in self.callbacks:
            callback.on_round_start(self, number)
        drawn = federation.sample(self.clients, number, self.participation_seed)
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
        counters.turn_to(number)
        with self.stopwatch("stage 1: checkpoints"):
            self._checkpoint()
        for callback in self.callbacks:
            callback.on_round_end(self, number, metrics)

    def _begin(self, name: str, number: int) -> bool:
        """Before a client trains in a round; whether it is there. One that drops out is noted and left as it was."""
        self._check_spent(name, number)
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
            self.counters.privacy[name] = self.counters.spent[name] = client.privacy
            self.counters.guaranteed[name] = content_hash(client.module.shared_state())
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
