"""The name of a federated run, which its server keeps for as long as there is one silo that knows it."""

from pathlib import Path

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.envelopes import is_run_name


def lasting_name(file: Path, proposed: str) -> str:
    """The name of a federated run that a file holds; where there is no file, the proposed one, written first.

    Raises:
        CheckpointError: the file holds no name. Going on under a new one would be refused by every silo that was there before.
    """
    if not file.exists():
        write_atomically(file, proposed.encode(), durable=True)
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
