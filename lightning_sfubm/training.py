"""Training with early stopping on validation, the same for clients of a federation and for single-domain methods."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.ranks import close_at_exit, is_first, rank, wait_for_all
from lightning_sfubm.safe_load import load_checkpoint
from lightning_sfubm.seeds import derive_seed

TrainerFactory = Callable[..., Trainer]
EpochHook = Callable[[int, dict[str, float]], None]


class SeededTrainer(Trainer):
    """:class:`lightning.Trainer` that knows the seed of the run it is part of, which the order of batches follows.

    Args:
        run_seed: of ``seed_everything``; ``None`` where none was set: the order then is the data module's own.
        kwargs: those of :class:`lightning.Trainer`.
    """

    def __init__(self, *, run_seed: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_seed = run_seed


class RankSeed(Callback):
    """Give each process of a distributed training random numbers of its own.

    Lightning seeds every process alike at the start of every fit, so that all would drop the same units in the same order, the
    next round again.

    Args:
        seed: of this training.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after Lightning's own seeding."""
        if trainer.world_size > 1:
            torch.manual_seed(derive_seed(self._seed, "rank", rank()))


class CloseAtExit(Callback):
    """Let each process of a distributed training end without an abort: :func:`~lightning_sfubm.ranks.close_at_exit`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs once the processes know each other."""
        close_at_exit()


class EpochRecorder(Callback):
    """Hand the metrics of every epoch to a function, as plain floats.

    Args:
        record: called with the epoch (from 1) and the metrics logged in it.
    """

    def __init__(self, record: EpochHook) -> None:
        self._record = record

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after validation of the epoch."""
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
            self._record(trainer.current_epoch + 1, metrics)


class PatientStopping(EarlyStopping):
    """Early stopping that says nothing before the trainer's ``min_epochs``.

    Lightning's own raises a signal that nothing lowers: patience that ran out on a plateau before ``min_epochs`` would end the
    training there, even if every epoch since had been better than the one before.
    """

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if self.monitor not in trainer.callback_metrics and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError(f"monitor '{self.monitor}' is none of the metrics of this training: {', '.join(known)}")
        before = trainer.should_stop
        super()._run_early_stopping_check(trainer)
        if trainer.current_epoch + 1 < (trainer.min_epochs or 1):
            trainer.should_stop = before


def check_had_batches(trainer: Trainer, label: str) -> None:
    """Refuse a fit that had nothing to train on, which Lightning ends as if it had trained.

    Args:
        trainer: after its ``fit``.
        label: of the training.

    Raises:
        DataError: there was no batch.
    """
    if trainer.limit_train_batches == 0 or trainer.num_training_batches == 0:
        raise DataError(
            f"{label}: there is no batch to train on: set trainer.limit_train_batches above 0, and have users of more "
            "interactions than the three that validation, test and a first history take"
        )


def fit_to_early_stopping(
    make_trainer: TrainerFactory,
    module: LightningModule,
    datamodule: LightningDataModule,
    *,
    label: str,
    folder: Path,
    max_epochs: int,
    patience: int,
    min_epochs: int = 1,
    monitor: str = "val/ndcg@10",
    record: EpochHook | None = None,
    callbacks: Iterable[Callback] = (),
) -> tuple[float, Trainer]:
    """Fit until ``monitor`` has not risen for ``patience`` epochs, then put the best epoch's weights into ``module``.

    Args:
        make_trainer: builds a trainer; called with ``label``, ``max_epochs``, ``min_epochs``, ``callbacks``, ``folder``.
        module: trained in place.
        datamodule: with validation data; test data is never touched.
        label: shown in the progress bar.
        folder: where the best epoch's weights are kept while training.
        max_epochs: upper bound.
        patience: epochs without improvement that end the training.
        min_epochs: epochs before which it does not end (an ID encoder starts on a plateau).
        monitor: validation metric, higher is better.
        record: receives each epoch's metrics.
        callbacks: further ones.

    Returns:
        The best value of ``monitor`` and the trainer.

    Raises:
        DataError: there was nothing to train on.
        ConfigError: ``monitor`` was never computed, so that no epoch could be chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_first():
        (folder / "best.ckpt").unlink(missing_ok=True)  # of a training that was cut off
    wait_for_all()
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=monitor,
        mode="max",
        save_top_k=1,
        save_weights_only=True,
        enable_version_counter=False,
    )
    stopping = PatientStopping(monitor=monitor, mode="max", patience=patience, check_on_train_epoch_end=False)
    extra = [EpochRecorder(record)] if record is not None else []
    trainer = make_trainer(
        label=label,
        max_epochs=max_epochs,
        min_epochs=min_epochs,
        callbacks=[best, stopping, *extra, *callbacks],
        folder=folder,
    )
    trainer.fit(module, datamodule=datamodule)
    check_had_batches(trainer, label)
    if best.best_model_score is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{label}: {monitor} was never computed, so no epoch could be chosen: set trainer.limit_val_batches above 0, "
            f"trainer.check_val_every_n_epoch to {max_epochs} or less, and have users of three interactions or more"
        )
    if best.best_model_path:
        state = load_checkpoint(best.best_model_path)
        module.load_state_dict(state["state_dict"], strict=False)
        wait_for_all()
        if is_first():
            Path(best.best_model_path).unlink()
    score = float(best.best_model_score) if best.best_model_score is not None else float("nan")
    return score, trainer


class Stopwatch:
    """Wall and CPU seconds by name; the same name adds up."""

    def __init__(self) -> None:
        self.timings: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            entry = self.timings.setdefault(name, {"wall_s": 0.0, "cpu_s": 0.0})
            entry["wall_s"] += time.perf_counter() - wall
            entry["cpu_s"] += time.process_time() - cpu
