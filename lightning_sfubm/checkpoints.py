"""Which file ``--ckpt_path last`` and ``best`` mean, also in a process that has trained nothing."""

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.safe_load import load_checkpoint

#: below a run's folder: where Lightning writes without a logger, and with one, in a folder for each start
_PLACES = ("checkpoints", "*/*/checkpoints")
_LAST = re.compile(r"last(-v\d+)?\.ckpt")
log = logging.getLogger(__name__)


def resolve(trainer: L.Trainer, ckpt_path: Any, fitting: bool = False) -> Any:
    """What to hand to Lightning for a ``ckpt_path``: a file where ``last`` or ``best`` is of an earlier process.

    Args:
        trainer: whose folder is searched, unless its own callbacks know the file.
        ckpt_path: as given.
        fitting: whether training may start from the beginning where there is no last checkpoint.

    Raises:
        CheckpointError: there is no such file.
    """
    own = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if any(c.best_model_path or c.last_model_path for c in own):
        return ckpt_path  # this process has trained
    places = [Path(trainer.default_root_dir), *(Path(c.dirpath) for c in own if c.dirpath is not None)]
    if ckpt_path is None and not fitting and _last_files(places):
        log.warning("no ckpt_path is given: the weights are those of the model as it is; 'last' is %s", _newest(places))
    if ckpt_path not in ("last", "best"):
        return ckpt_path
    try:
        path = find_checkpoint(places, ckpt_path)
    except CheckpointError as error:
        if not (fitting and ckpt_path == "last"):
            raise
        log.warning("%s; training starts from the beginning", error)
        return None
    log.info("checkpoint %s", path)
    return path


def find_checkpoint(places: list[Path], which: str) -> Path:
    """The newest ``last.ckpt`` of a run, or the best one that it names.

    Lightning looks in the folder of the process at work alone, which is a new one for each start, and trains or evaluates
    fresh weights where it finds none.

    Args:
        places: the run's folder, ``trainer.default_root_dir``, and folders that checkpoints are written to besides.
        which: ``"last"`` or ``"best"``.

    Raises:
        CheckpointError: there is no such file.
    """
    if not _last_files(places):
        raise CheckpointError(
            f"{places[0]}: no last.ckpt of an earlier run: fit with the callback ModelCheckpoint and save_last: true, or "
            "give the path of a checkpoint"
        )
    last = _newest(places)
    if which == "last":
        return last
    if last.is_dir():
        raise CheckpointError(f"{last}: a checkpoint in shards names no best one: give its path")
    states = load_checkpoint(last).get("callbacks", {})
    named = [state["best_model_path"] for state in states.values() if state.get("best_model_path")]
    if not named:
        raise CheckpointError(f"{last}: names no best checkpoint: give ModelCheckpoint a monitor, or a path instead")
    best = Path(named[0])
    beside = last.parent / best.name  # the folder may have been moved
    for path in (beside, best):
        if path.exists():
            return path
    raise CheckpointError(f"{beside}: the best checkpoint that {last} names is gone; give another path")


def _last_files(places: list[Path]) -> list[Path]:
    """Files, or folders where a model is divided among processes."""
    folders = [*places, *(folder for place in places for pattern in _PLACES for folder in place.glob(pattern))]
    return [path for folder in folders for path in folder.glob("last*.ckpt") if _LAST.fullmatch(path.name)]


def _newest(places: list[Path]) -> Path:
    return max(_last_files(places), key=lambda path: (path.stat().st_mtime_ns, str(path)))
