"""What a federated run is at any moment, where it is written, and how it goes on after a stop."""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_sfubm.errors import CheckpointError, ConfigError, PrivacyError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.checkpoint import find_state, load_state, save_state, state_folder
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.kept_record import remove_audit, set_record_aside
from lightning_sfubm.federated.ledger import Ledger
from lightning_sfubm.federated.messages import ReplayGuard
from lightning_sfubm.federated.recording import FOLDER, MessageStore
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.settings import difference, schedule_difference
from lightning_sfubm.federated.workers import WorkerPool
from lightning_sfubm.kept_rows import set_all_aside
from lightning_sfubm.privacy.secret import client_secret
from lightning_sfubm.ranks import is_first, refused_by_all, wait_for_all
from lightning_sfubm.training import Stopwatch

OF_SILO = "federation.id"  #: file that says of which run across machines a silo's folder holds its part
SECRETS = "secret_hashes.json"  #: file of a run's folder: hashes of the secrets it was begun with, by client
NONCE = "noise_nonce"  #: file of a run's folder; see :meth:`Exchange._run_nonce`


@dataclass
class Counters:
    """Where a run stands.

    Attributes:
        step: states written.
        round: rounds that are complete.
        exchanged: round of the last exchange of semantics, 0 = before the first; ``None`` = none yet.
        trained: metrics of the clients that have finished training in the round after ``round``: validation, and what has been
            spent of privacy.
        privacy: guarantee of what each of them trained, where there is one.
        guaranteed: hash of the weights that it is a guarantee of: nothing else leaves under it.
        spent: the last guarantee of each client: over all its rounds so far.
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
    guaranteed: dict[str, str] = field(default_factory=dict)
    spent: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    rounds_done: dict[str, int] = field(default_factory=dict)
    phases: dict[str, list[str]] = field(default_factory=dict)

    def turn_to(self, round: int) -> None:
        """Complete a round: what was noted of it is noted of no other."""
        self.round, self.trained, self.privacy, self.guaranteed, self.dropped = round, {}, {}, {}, []


class RunState:
    """Clients, server, counters and ledger of a run, and the files they are kept in.

    Args:
        federation: the schedule.
        clients: by name; at least one.
        callbacks: hooks; those that are not :class:`~lightning_sfubm.federated.hooks.FederatedCallback` are ignored.
        run_dir: where checkpoints, the message ledger and the history are written.
        seed: root seed.
        loggers: experiment loggers that callbacks may write to.
        settings: the :func:`~lightning_sfubm.federated.settings.lasting_settings` of a configuration, where there is one.

    Raises:
        ConfigError: no client, settings that do not fit the clients, or callbacks for rounds that the exchange does not have.
        PrivacyError: weights by number of examples, under differential privacy.
    """

    def __init__(
        self,
        federation: Federation,
        clients: dict[str, Client],
        callbacks: Iterable[object],
        run_dir: Path,
        seed: int,
        loggers: Iterable[Logger] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not clients:
            raise ConfigError("a federation needs at least one client: give data.domains at least one domain")
        federation.check_clients(clients)
        secure, callbacks = federation.secure_aggregation, list(callbacks)
        if secure is not None and federation.weighting == "examples" and len(clients) > 1:
            secure.check_examples({name: client.num_examples for name, client in clients.items()})
        # with exchange: nothing they are silent on purpose: it is the control of the same settings
        unread = sorted({type(c).__name__ for c in callbacks if getattr(c, "rounds_only", False)})
        if unread and federation.exchange == "semantics":
            raise ConfigError(
                f"{', '.join(unread)}: of rounds whose teacher weights are sent, and exchange: {federation.exchange} sends "
                "none: set trainer.federation.exchange to 'teacher' or 'both', or remove it from trainer.callbacks"
            )
        self.federation, self.clients = federation, dict(sorted(clients.items()))
        self.callbacks = [c for c in callbacks if isinstance(c, FederatedCallback)]
        self._private = any(getattr(c, "makes_private", False) for c in callbacks)
        keyed = (getattr(c, "secret_dir", None) for c in (*callbacks, federation.aggregator))
        self._secret_dirs = list(dict.fromkeys(str(folder) for folder in keyed if folder))
        if self._private and federation.weighting == "examples":
            raise PrivacyError(
                "weighting 'examples' discloses numbers of interactions that differential privacy does not cover: set it to "
                "'uniform'"
            )
        self.run_dir, self.seed = run_dir, seed
        self.participation_seed = seed  #: root of who is drawn for a round
        #: whether this is a run cut off before its first state: what it had sent stays in the ledger
        self.goes_on = False
        self.loggers = list(loggers)
        self.settings = dict(settings or {})
        self.counters = Counters()
        #: of the server to the clients. It need not outlive the process: rounds that are over are refused by their number
        self.answers = ReplayGuard()
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
            max_items=federation.max_items,
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
            CheckpointError: none is whole, or it belongs to another model, other clients, data or settings, or another
                schedule.
        """
        with refused_by_all():  # all have read the state before the first writes a newer one
            lines = self._read_state(path)
        if is_first():
            history = self.run_dir / "history.jsonl"
            kept = history.read_text().splitlines(keepends=True)[:lines] if lines else []
            write_atomically(history, "".join(kept).encode())

    def _read_state(self, path: Path) -> int:
        """Take over the newest whole state; returns how many lines of the history it knows of."""
        state = find_state(path)
        if "counters" not in json.loads((state / "loop.json").read_text())["stored"]:
            raise CheckpointError(
                f"{state}: was not written by a run that holds its clients: give this one another trainer.default_root_dir"
            )
        stored = load_state(state, self.server, self.clients)
        if changed := schedule_difference(stored["schedule"], self.federation.schedule(self.seed)):
            raise CheckpointError(
                f"{path}: was written by the schedule of another run: {changed}; set it back, or start anew in another "
                "trainer.default_root_dir"
            )
        if changed := difference(stored["settings"], self.settings):
            raise CheckpointError(
                f"{path}: was trained with other settings: {changed}; set them back, or start anew in another "
                "trainer.default_root_dir"
            )
        counters = Counters(**stored["counters"])
        if counters.spent and not self._private:
            raise PrivacyError(
                f"{path}: was trained with differential privacy and this run would go on without: add the callback "
                "DifferentialPrivacy again, or start anew in another trainer.default_root_dir"
            )
        self.counters = counters
        for name, client in self.clients.items():
            client.phases_done = list(self.counters.phases.get(name, []))
            client.rounds_done = self.counters.rounds_done.get(name, 0)
            client.restored = bool(client.rounds_done or client.phases_done)
        for callback in self.callbacks:
            if callback.state_key in stored["callbacks"]:
                callback.load_state_dict(stored["callbacks"][callback.state_key])
        history = self.run_dir / "history.jsonl"
        # A run that sent nothing has no ledger to tell its folder by.
        by_ledger = stored["ledger"] and not (self.run_dir / "ledger.jsonl").is_file()
        if stored["history"] and is_first() and not by_ledger and not history.is_file():
            raise CheckpointError(
                f"{path}: a run goes on in the folder that it was begun in, and {history} is not there: set "
                "trainer.default_root_dir to that folder"
            )
        self.ledger.resume(stored["ledger"])  # may refuse; nothing has been written before
        self._check_secrets(stored.get("secrets", {}))
        return int(stored["history"])

    def _start(self) -> None:
        """Clear the place of an earlier run, its states first and at once: half of them must not be gone on from."""
        with refused_by_all():
            if is_first():
                self._clear()

    def _check_secrets(self, stored: Mapping[str, str]) -> None:
        """Refuse to go on without the secrets that keyed what has left: building the clients has made new ones in their place.

        With those the same message would come with other noise, of which two have a mean with less, and the server's answer
        would be put in an order of items that is not the one it was sent in.

        Args:
            stored: hashes of the secrets that a state was written with, by client.
        """
        if changed := self.changed_secrets(stored):
            raise PrivacyError(
                f"the secrets of {changed} in {self.secret_places} are not those that this run was begun with: put the files "
                "back, run in the folder that it was begun in, set secret_dir to where they are now, or start anew in another "
                "trainer.default_root_dir"
            )

    def check_begun(self) -> None:
        """Refuse to go on from before the first state under other secrets than those that keyed what has left.

        Raises:
            PrivacyError: the secrets are others, or it is not known which they were.
        """
        if not self.ledger.messages() or self._earlier.exists():
            return  # nothing has left, or that of the run before
        path = self.run_dir / SECRETS
        if path.is_file():
            self._check_secrets(json.loads(path.read_text()))
        elif self._secret_dirs:
            raise PrivacyError(
                f"{self.ledger.path}: messages have left that were not keyed by the secrets in {self.secret_places}, and would "
                "leave again with other noise: start anew in another trainer.default_root_dir"
            )

    def changed_secrets(self, stored: Mapping[str, str]) -> list[str]:
        """Clients whose secrets are not those of a state; one that has none yet is given one, which is another.

        Args:
            stored: hashes of the secrets that the state was written with, by client.
        """
        return [name for name in sorted(stored) if stored[name] != self._secrets_hash(name)]

    @property
    def secret_places(self) -> str:
        """The folders of the secrets, as words."""
        return ", ".join(self._secret_dirs) or "no secret_dir"

    def _hashes(self) -> dict[str, str]:
        return {name: self._secrets_hash(name) for name in self.clients}

    def _secrets_hash(self, client: str) -> str:
        """Of a client's secrets, made where there are none yet; it discloses nothing of 32 random bytes."""
        secrets = b"".join(client_secret(folder, client) for folder in self._secret_dirs)
        return hashlib.sha256(b"state of a run" + secrets).hexdigest()

    def set_record_aside(self) -> None:
        """Move what tells of an earlier run in this folder out of the way, and say so."""
        set_all_aside(self.run_dir / "results")
        set_record_aside(self.run_dir)

    @property
    def _earlier(self) -> Path:
        """Where the states of the run before are until all that is of it is gone."""
        return self.run_dir / ".earlier"

    def _clear(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier
        if self.checkpoints.exists():
            if earlier.exists():
                shutil.rmtree(earlier)
            self.checkpoints.replace(earlier)
        for folder in ("clients", "csv"):
            shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        (self.run_dir / "history.jsonl").write_text("")
        if self.goes_on and not earlier.exists():
            remove_audit(self.run_dir)  # of what was sent before the first state
            self.ledger.resume(0)
        else:
            self.set_record_aside()
            (self.run_dir / NONCE).unlink(missing_ok=True)
            self.ledger.start()
        if self._secret_dirs:
            write_atomically(self.run_dir / SECRETS, json.dumps(self._hashes()).encode(), durable=True)
        else:
            (self.run_dir / SECRETS).unlink(missing_ok=True)
        shutil.rmtree(earlier, ignore_errors=True)

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
        if is_first():
            self._write_state()
        else:
            for name, client in self.clients.items():
                client.saved_as(state_folder(self.checkpoints, self.counters.step) / "clients" / f"{name}.ckpt")
        wait_for_all()

    def _write_state(self) -> None:
        with open(self.run_dir / "history.jsonl", "rb") as handle:
            lines = sum(1 for _ in handle)
        stored: dict[str, Any] = {
            "counters": vars(self.counters),
            "schedule": self.federation.schedule(self.seed),
            "callbacks": {c.state_key: state for c in self.callbacks if (state := c.state_dict())},
            "history": lines,
            "ledger": self.ledger.entries,
            "settings": self.settings,
            "secrets": self._hashes(),
        }
        self.ledger.flush()
        save_state(self.checkpoints, self.counters.step, stored, self.server, self.clients, self._pieces > 0)
