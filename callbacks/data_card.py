"""Print the data cards at the start of a ``fit`` without an experiment, which prints them itself."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console


class DataCardPrinter(Callback):
    """Print what was dropped from each domain and why, in the first process; nothing where the progress bar is off.

    The command line adds one by itself; there is nothing to configure.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs once the data module has been set up."""
        if stage == "fit":
            self.show(trainer, getattr(trainer, "datamodule", None))

    def show(self, trainer: Trainer, datamodule: Any) -> None:
        """Print the cards of a data module of one domain or of a federation; other data modules have none."""
        if not trainer.is_global_zero or trainer.progress_bar_callback is None:
            return
        one = getattr(datamodule, "data_card", None)
        console = Console(highlight=False)
        for card in getattr(datamodule, "data_cards", {}).values() if one is None else [one]:
            console.print(card)
