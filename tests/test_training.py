from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sfubm.training import fit_to_early_stopping


class Scripted(L.LightningModule):
    """A module whose validation metric follows a script."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/ndcg@10", self.values[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("plateau", "rise", "epochs"),
    [
        (5, 15, 20),  # patience runs out on the plateau, before min_epochs: the rise after it goes on to the end
        (5, 4, 12),  # ... and patience counts again from its last epoch
        (20, 0, 8),  # nothing but a plateau: the end is that of min_epochs
    ],
)
def test_a_plateau_before_min_epochs_does_not_end_a_training(
    plateau: int, rise: int, epochs: int, tmp_path: Path
) -> None:
    values = [0.1] * plateau + [0.1 + 0.01 * (i + 1) for i in range(rise)]
    values += [values[-1]] * (20 - len(values))
    data = L.LightningDataModule.from_datasets(torch.zeros(2, 1), torch.zeros(2, 1))

    def make_trainer(label: str, folder: Path, **settings: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return L.Trainer(**quiet, **settings)  # type: ignore[arg-type]

    best, trainer = fit_to_early_stopping(
        make_trainer, Scripted(values), data, label="scripted", folder=tmp_path, max_epochs=20, min_epochs=8, patience=3
    )
    assert trainer.current_epoch == epochs
    assert best == pytest.approx(max(values[:epochs]))
