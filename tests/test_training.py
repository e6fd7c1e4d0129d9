from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sfubm.errors import ConfigError, DataError
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


DATA = L.LightningDataModule.from_datasets(torch.zeros(2, 1), torch.zeros(2, 1))  # type: ignore[arg-type]


def make_trainer(label: str, folder: Path, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**quiet, **settings)  # type: ignore[arg-type]


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
    best, trainer = fit_to_early_stopping(
        make_trainer, Scripted(values), DATA, label="scripted", folder=tmp_path, max_epochs=20, min_epochs=8, patience=3
    )
    assert trainer.current_epoch == epochs
    assert best == pytest.approx(max(values[:epochs]))


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"limit_train_batches": 0}, DataError, "scripted: there is no batch to train on"),
        ({"limit_val_batches": 0}, ConfigError, "scripted: val/ndcg@10 was never computed"),
        ({"check_val_every_n_epoch": 3}, ConfigError, "check_val_every_n_epoch to 2 or less"),
    ],
)
def test_a_training_that_chose_no_epoch_is_refused(
    flags: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    def fit(**flags: Any) -> float:
        make = partial(make_trainer, num_sanity_val_steps=0, **flags)
        settings: dict[str, Any] = {"label": "scripted", "folder": tmp_path, "max_epochs": 2, "patience": 1}
        return fit_to_early_stopping(make, Scripted([0.1, 0.2]), DATA, **settings)[0]

    with pytest.raises(error, match=words):
        fit(**flags)
    assert fit(limit_train_batches=1, limit_val_batches=1) == pytest.approx(0.2)
    fit(fast_dev_run=True)


def test_a_monitor_that_is_no_metric_is_one_sentence_that_names_those_there_are(tmp_path: Path) -> None:
    make = partial(make_trainer, num_sanity_val_steps=0)
    settings: dict[str, Any] = {"label": "scripted", "folder": tmp_path, "max_epochs": 2, "patience": 1}
    with pytest.raises(ConfigError, match=r"^monitor 'val/ndgc@10' is none of .*: val/ndcg@10"):
        fit_to_early_stopping(make, Scripted([0.1, 0.2]), DATA, monitor="val/ndgc@10", **settings)
