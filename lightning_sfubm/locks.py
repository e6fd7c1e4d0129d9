"""Advisory locks on folders, so that two processes do not work over each other."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

from lightning_sfubm.errors import ConfigError

LOCK = ".lock"  #: in the folder while it is held; one that a killed process has left holds nothing
log = logging.getLogger(__name__)
_held: set[Path] = set()


@contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Keep a folder to this process, which may ask for it again meanwhile; released at the end, and where the process dies.

    A file system without locks gives none: a warning says so, and the folder is not kept.

    Args:
        folder: made where it is missing, with those above it, and removed again where they are empty at the end.
        option: the option that names another folder, for the error.

    Raises:
        ConfigError: another process keeps the folder, or it cannot be made or written into.
    """
    try:
        folder = folder.resolve()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        taken = nullcontext() if folder in _held else _taken(folder / LOCK, option)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error, option) from None
    if isinstance(taken, nullcontext):
        yield
        return
    with taken:
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)
            (folder / LOCK).unlink(missing_ok=True)  # before it is let go, so that it is nobody else's
            _remove_empty(missing)


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written into; it is left as it is, and not made where it is missing.

    Args:
        folder: any.
        option: the option that names another folder, for the error.

    Raises:
        ConfigError: it cannot be made or written into.
    """
    try:
        folder = folder.resolve()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        finally:
            _remove_empty(missing)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error, option) from None


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, inner ones first, that hold nothing."""
    for folder in folders:
        with suppress(OSError):  # never made, or somebody has written into it meanwhile
            folder.rmdir()


def _unwritable(folder: Path, error: Exception, option: str) -> ConfigError:
    """It lies below a file, nobody may write there, or its name is none."""
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"{str(folder)!r} cannot be written into ({reason}); give another folder by {option}")


def _taken(path: Path, option: str) -> TextIO:
    """The open lock file, which is held until it is closed."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a", encoding="utf-8")
        except FileNotFoundError:
            continue  # the folder was new and empty, and the process that kept it has removed it just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"{path.parent}: another process is at work there; wait for it, end it, or give another folder by {option}"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start nothing else in this folder", path.parent, error)
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that kept it has deleted this file just now
