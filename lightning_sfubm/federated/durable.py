"""Files that outlive a power cut: whole or not there, and on disk when the call returns."""

import os
from pathlib import Path

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated.envelopes import is_run_name


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file.

    Args:
        path: of the file; its folder is there.
        data: content.
        mode: permissions, less those that the umask takes away. The file never has others, not even while it is written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash; it would keep the permissions it has
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Put a folder's names on disk: a file that was renamed into it is there after a power cut only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lasting_name(file: Path, proposed: str) -> str:
    """The name of a federated run that a file holds; where there is no file, the proposed one, written first.

    Raises:
        CheckpointError: the file holds no name. Going on under a new one would be refused by every silo that was there before.
    """
    if not file.exists():
        write_durably(file, proposed.encode())
        return proposed
    try:
        name = file.read_bytes().decode("ascii", "replace")
    except OSError as error:
        raise CheckpointError(f"{file}: the name of the federated run cannot be read ({error.strerror})") from None
    if not is_run_name(name):
        raise CheckpointError(
            f"{file}: {name[:40]!r} is not the name of a federated run, 32 hexadecimal digits: put the file back, or begin a "
            "new run in other folders, the silos' too"
        )
    return name
