"""The ledger: one line for every message that travelled, in an append-only file that shows when it was changed.

Each line holds the hash of the line before it, so that a line changed, removed or put in between breaks the chain. A
resumed run sends again what it cannot know to have arrived: the lines written before stay, and the repetition is marked
``"resent": true`` where it says the same to the same (same round, client, direction, kind and content).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.evaluation.results import flush, write_atomically
from lightning_sfubm.federated.messages import Message
from lightning_sfubm.federated.recording import MessageStore
from lightning_sfubm.ranks import is_first

Entry = dict[str, object]
GENESIS = "0" * 64
#: what a line's mechanism may say of a message's ``content``, where nothing trained on users is in it
INITIAL_WEIGHTS, TEXTS_ALONE = "initial weights, from the seed", "item texts alone"
UNTRAINED = "item texts and initial weights"
#: entry of a line's mechanism: the guarantee of differential privacy under which weights left
PRIVATE = "differential privacy"
#: entries in which a message that is sent again agrees with the one before
SAME = ("round", "client", "direction", "kind", "content_sha256")
_FORM: dict[str, type] = {
    "round": int,
    "client": str,
    "direction": str,
    "kind": str,
    "bytes": int,
    "tensors": dict,
    "sha256": str,
    "content_sha256": str,
    "mechanism": dict,
    "previous": str,
}


class Ledger:
    """Writes the ledger of a run; of several processes that train together the first one does.

    Args:
        path: the file.
        store: where the messages themselves are kept for an audit; ``None`` = nowhere, the ledger holds hashes alone.
    """

    def __init__(self, path: Path, store: MessageStore | None = None) -> None:
        self.path, self.store = path, store
        #: whether each line is on disk before its message leaves: after a power cut it is all that tells of it
        self.durable = False
        self.entries = 0
        self._last = GENESIS
        self._earlier: set[tuple[object, ...]] = set()
        #: lines of messages that left after the state which the run went on from
        self.since: list[Entry] = []
        self._again: set[tuple[str, int]] = set()

    def messages(self) -> int:
        """Lines that the file holds, of whatever run; 0 where there is none."""
        if not self.path.is_file():
            return 0
        with open(self.path, "rb") as handle:
            return sum(1 for line in handle if line.strip())

    def start(self) -> None:
        """Begin an empty ledger; one of an earlier run in the same place is replaced."""
        if is_first():
            self.path.write_text("")
            if self.store is not None:
                self.store.keep_only(set())
        self.entries, self._last, self._earlier, self.since = 0, GENESIS, set(), []

    def resume(self, entries: int) -> None:
        """Go on with the ledger of an interrupted run.

        Args:
            entries: lines there were when the state was written that the run goes on from.

        Raises:
            CheckpointError: the ledger is shorter than that, not there, or its chain is broken.
        """
        if not is_first():
            return
        if not self.path.exists() and entries == 0:
            self.start()
            return
        lines: list[Entry] = []
        if self.path.exists():
            _drop_torn_line(self.path)
            lines = read_ledger(self.path)
        if len(lines) < entries:
            raise CheckpointError(
                f"{self.path} has {len(lines)} entries, the checkpoint was written after {entries}: put the file back; a run "
                "goes on in the folder that it was begun in"
            )
        if self.store is not None:  # a message is kept before its line is written: without a line it never left
            self.store.keep_only({str(line["sha256"]) for line in lines})
        self.since = lines[entries:]
        self._earlier = {tuple(line[key] for key in SAME) for line in self.since}
        self.entries, self._last = len(lines), entry_hash(lines[-1]) if lines else GENESIS

    def flush(self) -> None:
        """Put the lines so far on disk: a state must not be there without the lines it counts."""
        if is_first():
            flush(self.path)

    def private_since(self, client: str) -> dict[int, int]:
        """Steps of training that a client's private messages :attr:`since` state, by round, unless they were sent again."""
        steps: dict[int, int] = {}
        for line in self.since:
            mechanism: Any = line["mechanism"]
            privacy = mechanism.get(PRIVATE)
            if line["client"] == client and isinstance(privacy, dict) and isinstance(privacy.get("steps"), int):
                steps[int(str(line["round"]))] = privacy["steps"]
        return {round: taken for round, taken in sorted(steps.items()) if (client, round) not in self._again}

    def record(self, client: str, direction: str, message: Message, mechanism: dict[str, object]) -> None:
        """Write one line, before the message is used.

        Args:
            client: the silo at the other end of the server's channel.
            direction: ``"up"`` or ``"down"``.
            message: as it travelled.
            mechanism: what protected its content.
        """
        tensors: dict[str, dict[str, object]] = {
            n: {"shape": list(t.shape), "dtype": "float32"} for n, t in message.tensors.items()
        }
        content = content_hash(message.tensors)
        self.record_bytes(client, direction, message.kind, message.round, message.payload, mechanism, tensors, content)

    def record_bytes(
        self,
        client: str,
        direction: str,
        kind: str,
        round: int,
        payload: bytes,
        mechanism: dict[str, object],
        tensors: dict[str, dict[str, object]] | None = None,
        content: str | None = None,
    ) -> None:
        """As :meth:`record`, for bytes that hold no tensors in the clear.

        Args:
            client: see there, like ``direction`` and ``mechanism``.
            direction: see there.
            kind: of the message.
            round: of the federation.
            payload: what travelled.
            mechanism: see there.
            tensors: shape and dtype of the tensors in the message, by name.
            content: hash of what the message says; ``None`` = of its bytes.
        """
        if not is_first():
            return
        digest = hashlib.sha256(payload).hexdigest()
        entry: Entry = {
            "round": round,
            "client": client,
            "direction": direction,
            "kind": kind,
            "bytes": len(payload),
            "tensors": tensors or {},
            "sha256": digest,
            "content_sha256": content or digest,
            "mechanism": mechanism,
            "previous": self._last,
        }
        if tuple(entry[key] for key in SAME) in self._earlier:
            entry["resent"] = True
            if isinstance(mechanism.get(PRIVATE), dict):  # item vectors sent again say nothing of the weights
                self._again.add((client, round))
        if self.store is not None:
            self.store.keep(payload)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry, sort_keys=True) + "\n")
        if self.durable:
            self.flush()
        self.entries, self._last = self.entries + 1, entry_hash(entry)


def read_ledger(path: Path) -> list[Entry]:
    """The entries of a ledger, its chain checked.

    Raises:
        CheckpointError: the file cannot be read, a line is no entry, or does not follow the one before it.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: the ledger cannot be read ({error.strerror})") from None
    entries: list[Entry] = []
    last = GENESIS
    for number, line in enumerate(lines, 1):
        entry = read_entry(line)
        if entry is None:
            raise CheckpointError(f"{path}, line {number}: not an entry of a ledger")
        if entry["previous"] != last:
            raise CheckpointError(
                f"{path}, line {number}: does not follow the line before it; the ledger was changed after it was written"
            )
        entries.append(entry)
        last = entry_hash(entry)
    return entries


def read_entry(line: bytes) -> Entry | None:
    """The entry a line holds; ``None`` unless it is spelled as :meth:`Ledger.record_bytes` spells it. No chain is checked."""
    try:
        entry = json.loads(line)
        if json.dumps(entry, sort_keys=True).encode() != line or not isinstance(entry, dict):
            return None
    except (ValueError, RecursionError):
        return None
    return entry if all(type(entry.get(key)) is form for key, form in _FORM.items()) else None


def content_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of names, shapes and values: two messages that say the same have the same, whatever their nonces."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def entry_hash(entry: Entry) -> str:
    """sha256 of a line, which the next one holds."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that a crash cut off in the middle: it was never complete, so its message never left."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
