"""Checkpoints of a federated run: one folder a state, written whole or not at all.

``checkpoints/state-0007/`` holds ``loop.json`` (where the run stands, sha256 of every other file), ``server.ckpt`` (the
shared teacher and the state of its aggregation) and ``clients/<name>.ckpt`` (a Lightning checkpoint each). A folder is
filled under another name and renamed when complete; a torn one, by crash or by hand, is recognised by its hashes and the
one before is used. Most states link the files of clients that have not changed, so that their cost does not grow with the
number of clients; once in a while one is whole. Kept are the two newest states and the newest whole one, which shares no
file with another. Where a run goes on from an older state than the newest, the newer ones are removed once it has written one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.evaluation.results import flush
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.server import Server
from lightning_sfubm.safe_load import load_checkpoint

_FORMAT = 4


def state_folder(root: Path, step: int) -> Path:
    """Folder of state ``step`` under ``root``."""
    return root / f"state-{step:04d}"


def stored_states(root: Path) -> list[Path]:
    """Folders of states under ``root``, the oldest first: by number, as ``state-10000`` is older than none of four digits."""
    numbered = [(int(n), s) for s in root.glob("state-*") if (n := s.name.removeprefix("state-")).isdecimal()]
    return [state for _, state in sorted(numbered)]


def save_state(
    root: Path, step: int, stored: dict[str, Any], server: Server, clients: dict[str, Client], linked: bool = False
) -> Path:
    """Write state ``step`` under ``root`` and remove those no longer needed, and any of a higher number.

    Args:
        root: folder of the states.
        step: number of the state.
        stored: what the loop needs to go on, as JSON values.
        server: its state is written.
        clients: their states are written.
        linked: whether it may share files with the state before; a whole state shares none with any other.

    Returns:
        Folder of the state.
    """
    final, temporary = state_folder(root, step), root / f".state-{step:04d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "clients").mkdir(parents=True)
    files = {}
    for name, client in sorted(clients.items()):
        file = temporary / "clients" / f"{name}.ckpt"
        client.save(file, link=linked)
        new = client.saved_sha256 is None
        client.saved_sha256 = files[f"clients/{name}.ckpt"] = client.saved_sha256 or _sha256(file)
        if new or file.stat().st_nlink == 1:  # not one that an earlier state has put on disk
            flush(file)
    torch.save(server.state_dict(), temporary / "server.ckpt")
    files["server.ckpt"] = _sha256(temporary / "server.ckpt")
    loop = {"format": _FORMAT, "step": step, "linked": linked, "stored": stored, "files": files}
    loop["data"] = {name: client.datamodule.state_dict() for name, client in sorted(clients.items())}
    loop["sha256"] = _content(loop)
    (temporary / "loop.json").write_text(json.dumps(loop, indent=1, sort_keys=True))
    for file in (temporary / "server.ckpt", temporary / "loop.json", temporary / "clients", temporary):
        flush(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    flush(root)
    for name, client in clients.items():
        client.saved_as(final / "clients" / f"{name}.ckpt")
    states = stored_states(root)
    for abandoned in states[states.index(final) + 1 :]:  # the run went on from a state before them
        shutil.rmtree(abandoned)
    states = states[: states.index(final) + 1]
    own = next((state for state in reversed(states) if not _shares_files(state)), final)
    for old in states[:-2]:
        if old != own:
            shutil.rmtree(old)
    return final


def _shares_files(state: Path) -> bool:
    try:
        return bool(json.loads((state / "loop.json").read_text())["linked"])
    except (OSError, ValueError, KeyError, TypeError):
        return True  # torn: no state to fall back on


def find_state(path: Path) -> Path:
    """The newest whole state under ``path`` (a ``checkpoints`` folder), or ``path`` itself if it is a state.

    Raises:
        CheckpointError: there is none, or none is whole.
    """
    states = [path] if (path / "loop.json").exists() else stored_states(path)[::-1]
    problems = []
    for state in states:
        try:
            read_loop(state)
            return state
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(
        "; ".join(problems)
        or f"{path}: no federated checkpoint there; 'last' is the newest state of the run, without --ckpt_path a fit starts "
        "from the beginning"
    )


def read_loop(state: Path) -> dict[str, Any]:
    """Read ``loop.json`` of a state and check every file against its hash.

    Raises:
        CheckpointError: a file is missing or changed, or the format is another one.
    """
    try:
        loop: dict[str, Any] = json.loads((state / "loop.json").read_text())
        files = dict(loop["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{state / 'loop.json'}: missing or unreadable") from None
    if loop.get("format") != _FORMAT:
        raise CheckpointError(f"{state / 'loop.json'}: format {loop.get('format')}, this version reads {_FORMAT}")
    if loop.get("sha256") != _content({key: value for key, value in loop.items() if key != "sha256"}):
        raise CheckpointError(f"{state / 'loop.json'}: changed since the checkpoint was written")
    for name, digest in files.items():
        file = state / name
        if not file.is_file() or _sha256(file) != digest:
            raise CheckpointError(f"{file}: missing or changed since the checkpoint was written")
    return loop


def load_state(state: Path, server: Server, clients: dict[str, Client]) -> dict[str, Any]:
    """Restore server and clients from a state folder and return what the loop stored.

    Raises:
        CheckpointError: torn, of other clients, of other data, or of another model.
    """
    loop = read_loop(state)
    stored = sorted(f.stem for f in (state / "clients").glob("*.ckpt"))
    if stored != sorted(clients):
        raise CheckpointError(f"{state}: holds the clients {stored}, this run has {sorted(clients)}")
    for name, client in clients.items():
        client.datamodule.load_state_dict(loop["data"][name])  # refuses those of other data
    stored_server = load_checkpoint(state / "server.ckpt")
    try:
        server.load_state_dict(stored_server)
        result = dict(loop["stored"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{state}: not the state of a federated run ({error!r})") from None
    for name, client in clients.items():
        client.load(state / "clients" / f"{name}.ckpt")
    return result


def _content(loop: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(loop, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: handle.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()
