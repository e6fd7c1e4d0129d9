"""Messages as they travelled, kept for an audit. Off by default: then only hashes are kept, in the ledger.

What lies here is sensitive. A teacher's weights in the clear tell more than their mean after secure aggregation, and item
vectors can be linked to a catalogue. Files and folder are readable by their owner alone; delete the folder after the audit.
"""

import hashlib
import os
from pathlib import Path

from lightning_sfubm.errors import PrivacyError

FOLDER = "messages"  #: below a run's folder


class MessageStore:
    """Message bytes by their sha256, the hash that the ledger holds.

    Args:
        folder: made at first use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, payload: bytes) -> None:
        """Write a message, whole or not at all."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / hashlib.sha256(payload).hexdigest()
        temporary = path.with_suffix(".tmp")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as handle:
            handle.write(payload)
        os.replace(temporary, path)

    def keep_only(self, hashes: set[str]) -> None:
        """Remove every file that is not one of these messages."""
        for path in self._files():
            if path.name not in hashes:
                path.unlink()

    def names(self) -> set[str]:
        """Names of the files, which are hashes unless somebody else wrote here."""
        return {path.name for path in self._files()}

    def read(self, sha256: str) -> bytes:
        """The message of a hash.

        Raises:
            PrivacyError: it is not there, or is no longer what its name says.
        """
        path = self.folder / sha256
        if not path.is_file():
            raise PrivacyError(f"{path}: the message was not recorded")
        payload = path.read_bytes()
        if hashlib.sha256(payload).hexdigest() != sha256:
            raise PrivacyError(f"{path}: the recorded message was changed after it was written")
        return payload

    def _files(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []
