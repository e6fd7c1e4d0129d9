"""Check that the ledger holds together, and that the recorded messages agree with it.

The chain of hashes shows a line that was changed, removed or put in between. It does not show a ledger that was rewritten
from some line on with new hashes; so the hash of the last line (``head``) is printed, to be noted where the writer of the
file cannot reach. Lines cut off at the end show against the newest checkpoint, and against messages that have no line;
where there is no checkpoint, or it is older than the end, the check says that the end could not be checked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_sfubm.errors import CheckpointError, MessageError, PrivacyError
from lightning_sfubm.federated.checkpoint import stored_states
from lightning_sfubm.federated.ledger import GENESIS, content_hash, entry_hash, read_ledger
from lightning_sfubm.federated.messages import Message, MessageSchema, unpack
from lightning_sfubm.federated.recording import FOLDER, MessageStore

#: Schemas by (kind, direction); what secure aggregation sends has none here: it is masked, and checked by its protocol.
Schemas = Mapping[tuple[str, str], MessageSchema]
_MAX_PROBLEMS = 20


@dataclass
class Check:
    """What was compared, and what does not agree.

    Attributes:
        lines: entries of the ledger.
        bytes: that they count, by direction, resent ones included.
        recorded: entries whose message was found and has the hash and size of its line.
        parsed: of these, messages that follow their schema and say what their line says.
        head: hash of the last line.
        problems: one sentence each; empty where all agrees.
        unchecked: what could not be compared and why, one sentence each.
        entries: the lines themselves.
        messages: the parsed messages with their lines, in order.
    """

    lines: int = 0
    bytes: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    recorded: int = 0
    parsed: int = 0
    head: str = GENESIS
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list, repr=False)
    messages: list[tuple[dict[str, Any], Message]] = field(default_factory=list, repr=False)

    def facts(self) -> dict[str, Any]:
        """As JSON values, without lines and messages."""
        names = ("lines", "bytes", "recorded", "parsed", "head", "problems", "unchecked")
        return {name: getattr(self, name) for name in names}


def check_run(run_dir: Path, schemas: Schemas | None = None) -> Check:
    """Check the ledger of a run folder, and the recorded messages where there are any.

    Args:
        run_dir: folder of the run.
        schemas: of the run's messages; with them messages are parsed too.
    """
    path, check = run_dir / "ledger.jsonl", Check()
    if not path.is_file():
        check.problems.append(f"{path}: there is no ledger")
        return check
    try:
        entries: list[dict[str, Any]] = read_ledger(path)
    except CheckpointError as error:
        check.problems.append(str(error))
        return check
    check.lines, check.entries = len(entries), entries
    check.head = entry_hash(entries[-1]) if entries else GENESIS
    whole = []
    for number, entry in enumerate(entries, 1):
        if entry["direction"] not in check.bytes:
            check.problems.append(f"{path}, line {number}: direction missing or unreadable")
            continue
        check.bytes[entry["direction"]] += entry["bytes"]
        whole.append((number, entry))
    _against_checkpoint(run_dir, check)
    store = MessageStore(run_dir / FOLDER)
    if names := store.names():
        _against_messages(path, whole, store, names, schemas or {}, check)
    if len(check.problems) > _MAX_PROBLEMS:
        more = len(check.problems) - _MAX_PROBLEMS
        check.problems[_MAX_PROBLEMS:] = [f"and {more} more problems"]
    return check


def _against_checkpoint(run_dir: Path, check: Check) -> None:
    """A run's newest state knows how many lines there were when it was written; without it the end is not known."""
    unknown = "whether lines are missing at its end could not be checked"
    if not (states := stored_states(run_dir / "checkpoints")):
        check.unchecked.append(f"{unknown}: the run folder holds no checkpoint that says how many there were")
        return
    state = states[-1]
    try:
        lines = int(json.loads((state / "loop.json").read_text())["stored"]["ledger"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        check.unchecked.append(f"{unknown}: {state.name}/loop.json, the newest checkpoint, is missing or unreadable")
        return
    if check.lines < lines:
        check.problems.append(
            f"the ledger has {check.lines} lines, {state.name} was written after {lines}: lines are missing at the end"
        )
    elif check.lines > lines:
        check.unchecked.append(f"{unknown}: {state.name}, the newest checkpoint, was written after {lines} of them")


def _against_messages(
    path: Path,
    entries: list[tuple[int, dict[str, Any]]],
    store: MessageStore,
    names: set[str],
    schemas: Schemas,
    check: Check,
) -> None:
    nonces: set[str] = set()
    for number, entry in entries:
        where = f"{path}, line {number}"
        try:
            payload = store.read(entry["sha256"])
        except PrivacyError as error:
            check.problems.append(f"{where}: {error}")
            continue
        if len(payload) != entry["bytes"]:
            check.problems.append(f"{where}: states {entry['bytes']} bytes, the message has {len(payload)}")
            continue
        check.recorded += 1
        schema = schemas.get((entry["kind"], entry["direction"]))
        if schema is None:
            continue
        try:
            message = unpack(schema, payload)
        except MessageError as error:
            check.problems.append(f"{where}: {error}")
            continue
        if different := _differences(entry, message, nonces):
            check.problems.append(f"{where}: the message has another {', '.join(different)}")
            continue
        nonces.add(message.nonce)
        check.parsed += 1
        check.messages.append((entry, message))
    if unlisted := names - {entry["sha256"] for _, entry in entries}:
        check.problems.append(
            f"{len(unlisted)} recorded messages have no line in the ledger: lines are missing, or the run was cut off while "
            "it wrote (then go on with it once: it removes what never left)"
        )


def _differences(entry: dict[str, Any], message: Message, nonces: set[str]) -> list[str]:
    """What a message's own words say otherwise than its line. A broadcast says "server" whoever receives it."""
    tensors = {name: list(tensor.shape) for name, tensor in message.tensors.items()}
    stated = {name: t.get("shape") if isinstance(t, dict) else None for name, t in entry["tensors"].items()}
    sender = entry["client"] if entry["direction"] == "up" else "server"
    agrees = {
        "round": message.round == entry["round"],
        "sender": message.client == sender,
        "set of tensors": tensors == stated,
        "content": content_hash(message.tensors) == entry["content_sha256"],
        "nonce than a message not seen before": message.nonce not in nonces,
    }
    return [name for name, right in agrees.items() if not right]
