"""Messages of the server that wait for a silo to take part again.

They are what :mod:`lightning_sfubm.federated.recording` keeps for an audit, and as sensitive: files and folder are readable by
their owner alone. A message is on disk before a state refers to it, and is deleted once no state on disk does any more, so
that a coordinator which goes on from any of its states finds what that state still has to deliver.
"""

import hashlib
import json
import re
from pathlib import Path

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.evaluation.results import flush, write_atomically
from lightning_sfubm.federated.checkpoint import stored_states
from lightning_sfubm.federated.messages import Message

_OWN = re.compile(r"\.?[0-9a-f]{64}(\..*)?")  # a message, or what a crash left of one


class Outbox:
    """Message bytes by their sha256.

    Args:
        folder: made at first use.
        checkpoints: folder of the states that refer to messages.
    """

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self.folder, self.checkpoints = folder, checkpoints

    def keep(self, message: Message) -> None:
        """Write a message; it is on disk when this returns."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # one that an earlier version has made is open to all
        flush(self.folder.parent)
        write_atomically(self.folder / message.sha256, message.payload, durable=True, mode=0o600)

    def read(self, sha256: str) -> bytes:
        """The message of a hash.

        Raises:
            CheckpointError: it is not there, or is no longer what its name says.
        """
        path = self.folder / sha256
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: a message to deliver cannot be read ({error.strerror})") from None
        if hashlib.sha256(payload).hexdigest() != sha256:
            raise CheckpointError(f"{path}: a message to deliver was changed after it was written")
        return payload

    def clean(self) -> bool:
        """Delete the messages that no state refers to; call it when a new state has been written.

        Nothing is deleted as long as one of the states cannot be read, as nobody knows what it refers to.

        Returns:
            Whether messages are left that the newest state does not refer to.
        """
        if not self.folder.is_dir():
            return False
        self.folder.chmod(0o700)
        # the newest state came by a rename: on disk before anything goes that only its predecessors needed
        flush(self.checkpoints)
        referred = [_referred_to(state) for state in stored_states(self.checkpoints)]
        files = [path for path in sorted(self.folder.iterdir()) if _OWN.fullmatch(path.name)]
        if any(hashes is None for hashes in referred):
            return bool(files)
        wanted = set().union(*(hashes or () for hashes in referred))
        for path in files:
            if path.name not in wanted:
                path.unlink()
        return bool(wanted - (referred[-1] or set()))


def _referred_to(state: Path) -> set[str] | None:
    """Hashes of the messages that a state still has to deliver; ``None`` where that cannot be read."""
    try:
        outbox = json.loads((state / "loop.json").read_text())["stored"]["progress"]["outbox"]
        return {str(sha256) for kinds in outbox.values() for sha256 in kinds.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
