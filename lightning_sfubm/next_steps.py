"""What ``fit`` of one model says at its end: that it trained nothing, where its checkpoints are, what uses the best one."""

import shlex
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_sfubm.checkpoints import find_checkpoint
from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.modules.stage1 import CatalogueModule


class StepsTaken(L.Callback):
    """Whether a training took a step of its own: the steps of a checkpoint that it went on from count in the trainer's."""

    def __init__(self) -> None:
        self.any = False

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note it."""
        self.any = True


def nothing_trained(trainer: L.Trainer) -> str:
    """What is said of a training that ended before its first step."""
    limits = ", ".join(
        f"{name} {getattr(trainer, name)}" for name in ("max_epochs", "max_steps", "limit_train_batches")
    )
    return (
        f"nothing was trained: trainer and data left no step to take ({limits}); raise what ended it, or check the data"
    )


def next_steps(trainer: L.Trainer, model: L.LightningModule, argv: list[str]) -> list[str]:
    """Lines on the checkpoints of a training that has ended; none where it has written none.

    Args:
        trainer: that has trained.
        model: what it has trained.
        argv: of the command, ``fit`` first.
    """
    written = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
    if not written:
        return []
    own = next((c for c in written if c.monitor is not None), written[0])
    what = "checkpoint"
    if own.monitor is not None and own.best_model_score is not None:
        what = f"best {own.monitor} {float(own.best_model_score):.4f}"
    last = _last(written)
    lines = [f"{what}: {own.best_model_path}{f'; last: {last}' if last else ''}"]
    if is_overridden("test_step", model):
        which = "best" if _is_found(trainer, own, last) else own.best_model_path
        command = shlex.join(["lightning-sfubm", "test", *_options(argv), "--ckpt_path", which])
        more = " (or predict in place of test)" if isinstance(model, CatalogueModule) else ""
        lines.append(f"next: {command}{more}")
    return lines


def _last(written: list[ModelCheckpoint]) -> str:
    """Where the newest weights are, by Lightning's own name for them or by that of a callback that keeps no others."""
    paths = [
        c.last_model_path or (c.best_model_path if c.monitor is None and c.filename == "last" else "") for c in written
    ]
    return next((path for path in paths if path), "")


def _is_found(trainer: L.Trainer, own: ModelCheckpoint, last: str) -> bool:
    """Whether a new process with the same options finds this training's best checkpoint as ``best``."""
    try:
        found = find_checkpoint([Path(trainer.default_root_dir)], "last")
    except CheckpointError:
        return False
    return own.monitor is not None and found.is_file() and found.resolve() == Path(last).resolve()


def _options(argv: list[str]) -> list[str]:
    """Options of a ``fit``, less the checkpoint that it went on from."""
    options = [argument for argument in argv[1:] if not argument.startswith("--ckpt_path=")]
    if "--ckpt_path" in options:
        at = options.index("--ckpt_path")
        del options[at : at + 2]
    return options
