"""Flags and callbacks of a federated run, from which the trainers of its single trainings are made."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    ThroughputMonitor,
)
from lightning.pytorch.cli import SaveConfigCallback

from lightning_sfubm.callbacks.progress import LabelledProgressBar
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.training import RankSeed

_PARTS = {"accelerator", "strategy", "plugins", "profiler"}
_NEED_LOGGER = (LearningRateMonitor, DeviceStatsMonitor, ThroughputMonitor)
_OWN = {"max_epochs", "min_epochs", "callbacks", "logger", "default_root_dir", "num_sanity_val_steps", "max_steps"}


class TrainerFlags:
    """What :class:`lightning.Trainer` was asked for.

    Args:
        flags: its keyword arguments.

    Attributes:
        callbacks: those that were configured.
    """

    def __init__(self, flags: Mapping[str, Any]) -> None:
        # Copies of parts that a trainer makes its own: each training gets one of its own in turn.
        self._flags = _with_own_parts(flags)
        # A copy: Lightning adds callbacks of its own to the list it is given.
        self.callbacks: list[Callback] = _as_list(flags.get("callbacks"))

    @property
    def quiet(self) -> bool:
        """Whether progress bars were switched off."""
        return self._flags.get("enable_progress_bar") is False

    def of_worker(self) -> dict[str, Any]:
        """Keyword arguments for the trainer of a worker process, which logs nothing and writes no configuration."""
        # The command line's callback holds the parser, and with it this process's trainer: no other process can be sent it.
        callbacks = [c for c in self.callbacks if not isinstance(c, SaveConfigCallback)]
        return {k: v for k, v in self._flags.items() if k != "logger"} | {"callbacks": callbacks}

    def of_training(
        self,
        label: str,
        callbacks: Iterable[Callback],
        logs: bool,
        shares: bool,
        seed: int,
        overrides: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Keyword arguments of the trainer of one training, but for those that differ for each: epochs, logger, folder.

        Args:
            label: for the progress bar.
            callbacks: of this training.
            logs: whether it has a logger.
            shares: whether its result is shared; otherwise callbacks with ``rounds_only`` are left out.
            seed: of the training, where ``callbacks`` bring no :class:`~lightning_sfubm.training.RankSeed`.
            overrides: further arguments.
        """
        flags = {k: v for k, v in _with_own_parts(self._flags).items() if k not in _OWN} | dict(overrides)
        local = (c for c in self.callbacks if _is_local(c) and (shares or not getattr(c, "rounds_only", False)))
        if not logs:
            local = (c for c in local if not isinstance(c, _NEED_LOGGER))
        own: list[Callback] = [copy.deepcopy(c) for c in local]
        if flags.get("enable_progress_bar") in (None, True):
            own.append(LabelledProgressBar(label))
        callbacks = list(callbacks)
        if not any(isinstance(c, RankSeed) for c in callbacks):
            own.append(RankSeed(seed))
        # A training keeps its best epoch whatever was asked for: that is how it ends.
        flags["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        flags["use_distributed_sampler"] = False  # the batch samplers shard by rank themselves
        flags["enable_model_summary"] = flags.get("enable_model_summary") or False
        return {**flags, "callbacks": [*own, *callbacks], "num_sanity_val_steps": 0}


def _with_own_parts(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {k: copy.deepcopy(v) if k in _PARTS else v for k, v in flags.items()}


def _is_local(callback: Callback) -> bool:
    # Progress bars get a label of their own; saving the config is the command line's, once per run.
    return not isinstance(callback, (FederatedCallback, ProgressBar, SaveConfigCallback))


def _as_list(callbacks: Any) -> list[Callback]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
