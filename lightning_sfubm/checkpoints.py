"""Which file ``--ckpt_path last`` and ``best`` mean, also in a process that has trained nothing."""

import logging
from pathlib import Path
from typing import Any

import lightning as L

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.safe_load import load_checkpoint

log = logging.getLogger(__name__)


def resolve(trainer: L.Trainer, ckpt_path: Any, fitting: bool = False) -> Any:
    """What to hand to Lightning for a ``ckpt_path``: a file where ``last`` or ``best`` is of an earlier process.

    Args:
        trainer: whose folder is searched, unless it has trained itself.
        ckpt_path: as given.
        fitting: whether training may start from the beginning where there is no last checkpoint.

    Raises:
        CheckpointError: there is no such file.
    """
    run_dir = Path(trainer.default_root_dir)
    if any(getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks):
        return ckpt_path  # this process has trained
    if ckpt_path is None and not fitting and _last_files(run_dir):
        log.warning("no ckpt_path is given, so that the weights are untrained; %s holds trained ones: 'last'", run_dir)
    if ckpt_path not in ("last", "best"):
        return ckpt_path
    try:
        path = find_checkpoint(run_dir, ckpt_path)
    except CheckpointError as error:
        if not (fitting and ckpt_path == "last"):
            raise
        log.warning("%s; training starts from the beginning", error)
        return None
    log.info("checkpoint %s", path)
    return path


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The newest ``last.ckpt`` below a run's folder, or the best one that it names.

    Lightning looks in the folder of the process at work alone, which is a new one for each start, and trains or evaluates
    fresh weights where it finds none.

    Args:
        run_dir: folder of the run, ``trainer.default_root_dir``.
        which: ``"last"`` or ``"best"``.

    Raises:
        CheckpointError: there is no such file.
    """
    found = _last_files(run_dir)
    if not found:
        raise CheckpointError(
            f"{run_dir}: no last.ckpt below it: fit with the callback ModelCheckpoint and save_last: true, or give "
            "the path of a checkpoint"
        )
    last = max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))
    if which == "last":
        return last
    states = load_checkpoint(last).get("callbacks", {})
    named = [state["best_model_path"] for state in states.values() if state.get("best_model_path")]
    if not named:
        raise CheckpointError(f"{last}: names no best checkpoint: give ModelCheckpoint a monitor, or a path instead")
    best = Path(named[0])
    beside = last.parent / best.name  # the folder may have been moved
    for path in (beside, best):
        if path.is_file():
            return path
    raise CheckpointError(f"{beside}: the best checkpoint that {last} names is gone; give another path")


def _last_files(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.rglob("last*.ckpt") if path.is_file()]
