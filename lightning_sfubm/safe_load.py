"""The one way checkpoints are read: tensors and plain values, never a pickled object, never from the network."""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_sfubm.errors import CheckpointError


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint file.

    Args:
        path: of the file; an address of the network is refused.
        map_location: as in :func:`torch.load`.

    Returns:
        What was stored, by name.

    Raises:
        CheckpointError: the file is missing, torn, no checkpoint, or holds objects that would run code to be read.
    """
    if "://" in str(path):
        raise CheckpointError(
            f"{path}: checkpoints are read from files only; download it first, from a place you trust"
        )
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no checkpoint file")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load raises many classes for torn or unsafe files
        raise CheckpointError(f"{path}: {_refusal(Path(path), error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} where a checkpoint is a dictionary")
    return content


def _refusal(path: Path, error: Exception) -> str:
    """What is wrong with a file that ``torch.load`` has refused; its own words advise to trust the file."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    words = " ".join(str(error).split())
    if code := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", words):
        return f"not a safe checkpoint of this product: to read it would run or build {code[1]}, which is refused"
    with open(path, "rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # of an archive and of a pickle, the two forms of PyTorch's files
        return "not a checkpoint file; give the path of one that fit has written"
    if type(error).__name__ == "UnpicklingError" or "PytorchStreamReader" in words or "inline_container" in words:
        return "not a safe checkpoint of this product: it is cut off, damaged, or a file of another kind"
    return f"not a safe checkpoint of this product ({words.partition('. ')[0]})"


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, reading by :func:`load_checkpoint` whatever it is asked for."""

    def load_checkpoint(  # type: ignore[override]
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, with ``weights_only`` taken as true.

        Raises:
            CheckpointError: see :func:`load_checkpoint`.
        """
        return load_checkpoint(path, map_location)
