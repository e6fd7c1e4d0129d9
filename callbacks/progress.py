"""One progress bar for a whole ``fit``, labelled with who is training and in which round or phase."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from lightning_sfubm.privacy.rounding import round_up


class LabelledProgressBar(ProgressBar):
    """A bar over all training batches of a ``fit``, the label in front, the validated metric and the spent privacy behind.

    Lightning's own bars restart at each epoch and do not know of rounds; an epoch of a small silo lasts a second.

    Args:
        label: for instance ``"round 2/5, beauty"``.
        monitor: logged metric shown behind the bar.
    """

    def __init__(self, label: str = "fit", monitor: str = "val/ndcg@10") -> None:
        super().__init__()
        self.label, self.monitor = label, monitor
        self._bar: tqdm | None = None
        self._enabled = True
        self._validated = self._shown = ""

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        epochs = (trainer.max_epochs or 0) - trainer.current_epoch
        batches = trainer.num_training_batches
        known = epochs > 0 and batches != float("inf")
        self._bar = tqdm(
            total=int(epochs * batches) if known else None,
            desc=self.label,
            disable=None if self._enabled else True,  # None: shown on terminals only
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
            unit="batch",
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one batch."""
        if self._bar is not None:
            self._bar.update(1)
            self._show(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validated metric."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None:
            self._validated = f"{self.monitor} {float(value):.3f}"
        self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar; nothing stays on the terminal."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar before the error is shown."""
        self._close()

    def _show(self, trainer: Trainer) -> None:
        words = ", ".join(filter(None, (self._validated, spent_words(trainer.progress_bar_metrics))))
        if self._bar is not None and words != self._shown:
            self._shown = words
            self._bar.set_postfix_str(words)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def spent_words(metrics: Mapping[str, Any]) -> str:
    """The privacy that training has spent so far, in words; empty where ``metrics`` holds none."""
    if "privacy/epsilon" not in metrics:
        return ""
    # Lightning keeps metrics in single precision. As a double .001 would be .0010000000475, and .0011 rounded up.
    epsilon, delta = (float(str(np.float32(metrics[f"privacy/{name}"]))) for name in ("epsilon", "delta"))
    return f"epsilon {round_up(epsilon, 3)} at delta {round_up(delta, 2)}"
