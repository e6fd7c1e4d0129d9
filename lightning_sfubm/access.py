"""What to say of files that may not be read or written: whose they are and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_sfubm.errors import DataError


def owner_of(path: Path) -> str:
    """The account that a file belongs to, or the nearest folder above it that this account may look at."""
    for part in (path, *path.absolute().parents):
        try:
            return f"account '{part.owner()}'"
        except KeyError:  # a number without a name, in a container say
            return f"account {part.stat().st_uid}"
        except OSError:
            continue
    return "another account"


def unreadable(path: Path, error: Exception, where: str = "") -> DataError:
    """The error for a source file that the system or its decompression gave up.

    Args:
        path: of the file; one that ends in ``.gz`` is compressed.
        error: what was raised.
        where: the place as the error names it; the path by default.
    """
    if isinstance(error, PermissionError):
        return DataError(f"{path}: belongs to {owner_of(path)}, and this account may not read it; ask for the right to")
    if path.suffix == ".gz":
        return DataError(f"{where or path}: broken or truncated gzip file ({error}); fetch it again")
    return DataError(f"{where or path}: cannot be read ({error})")


@contextmanager
def own_cache(path: Path) -> Iterator[None]:
    """Tell an entry of the cache that is another account's, or has no place, from a damaged one.

    Prepared domains and candidate lists hold what users did, so they are kept for the account that made them.

    Raises:
        DataError: something at or below ``path`` may not, or cannot, be read or written.
    """
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"{path}: this part of the cache belongs to {owner_of(path)} and is closed to this account; set SFUBM_CACHE "
            "to a folder of your own"
        ) from error
    except OSError as error:  # it would lie below a file or in a place that takes none, or the disk is full
        raise DataError(
            f"{path}: this part of the cache cannot be read or written ({error.strerror or error}); free some space or set "
            "SFUBM_CACHE to a folder that can be written into"
        ) from error
