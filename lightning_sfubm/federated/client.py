"""A client: one domain's module, data and trainers. Only what :meth:`Client.uploads` returns ever leaves it."""

import shutil
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_sfubm.contracts import FederatedModule
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.seeds import derive_seed, torch_generator
from lightning_sfubm.training import EpochHook, EpochRecorder, Stopwatch, TrainerFactory, fit_to_early_stopping


class Client:
    """One silo.

    Args:
        name: of the domain.
        module: a :class:`~lightning_sfubm.contracts.FederatedModule` and LightningModule, this client's own copy.
        datamodule: of the domain; its data never leaves.
        make_trainer: builds the trainer of a local round or phase.
        seed: root seed of the run.

    Raises:
        ConfigError: the module does not implement the federated contract.
    """

    def __init__(
        self,
        name: str,
        module: LightningModule,
        datamodule: LightningDataModule,
        make_trainer: TrainerFactory,
        seed: int,
    ) -> None:
        if not isinstance(module, FederatedModule):
            raise ConfigError(
                f"{type(module).__name__} cannot be federated: it lacks methods of lightning_sfubm.contracts.FederatedModule"
            )
        self.name, self.module, self.datamodule, self.seed = name, module, datamodule, seed
        self.make_trainer = make_trainer
        self._trainer: Trainer | None = None
        self.saved: Path | None = None
        self.phases_done: list[str] = []
        self.metrics: dict[str, float] = {}
        self.watch = Stopwatch()

    def prepare(self) -> None:
        """Bind the module to the catalogue: item tables get this domain's size, the text vectors become its input.

        Initial weights depend on the seed alone, the same for each client, so that a shared teacher starts equal.
        """
        torch.manual_seed(derive_seed(self.seed, "initial weights"))
        self.module.bind(self.datamodule.catalogue)  # type: ignore[operator, attr-defined]

    @property
    def num_examples(self) -> int:
        """Training interactions; disclosed only where FedAvg weighs by examples."""
        return int(self.datamodule.catalogue.train_counts.sum())  # type: ignore[attr-defined]

    def semantics(self) -> Tensor:
        """Unperturbed item vectors (N, D) in the client's private order."""
        return self.module.semantics()[self._order()]

    def receive_semantics(self, vectors: Tensor) -> None:
        """Take the server's answer, rows in the private order of :meth:`semantics`."""
        restored = torch.empty_like(vectors)
        restored[self._order()] = vectors
        self.module.receive_semantics(restored)

    def _order(self) -> Tensor:
        generator = torch_generator(self.seed, "upload order", self.name)
        return torch.randperm(len(self.module.semantics()), generator=generator)

    def train_round(
        self, round: int, rounds: int, epochs: int, state: Path | None, folder: Path, record: EpochHook
    ) -> None:
        """Train ``epochs`` more epochs of the round phase, going on from ``state`` (weights, optimiser, schedules, counters).

        The path is the same whether the process has lived since the first round or was restarted.
        """
        self.module.set_phase(self.module.round_phase)
        torch.manual_seed(derive_seed(self.seed, "client", self.name, "round", round))
        trainer = self.make_trainer(
            label=f"round {round}/{rounds}, {self.name}",
            max_epochs=round * epochs,
            min_epochs=None,
            callbacks=[EpochRecorder(record)],
            folder=folder,
        )
        with self.watch("training"):
            trainer.fit(self.module, datamodule=self.datamodule, ckpt_path=state, weights_only=True)
        self._trainer = trainer
        self.metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val/")}

    def train_phase(
        self,
        phase: str,
        folder: Path,
        record: EpochHook,
        *,
        max_epochs: int,
        min_epochs: int,
        patience: int,
        monitor: str,
    ) -> float:
        """Train one local phase to early stopping, keep the best epoch's weights and return its ``monitor``."""
        self.module.set_phase(phase)
        torch.manual_seed(derive_seed(self.seed, "client", self.name, "phase", phase))
        with self.watch("training"):
            best, self._trainer = fit_to_early_stopping(
                self.make_trainer,
                self.module,
                self.datamodule,
                label=f"local {phase}, {self.name}",
                folder=folder,
                max_epochs=max_epochs,
                min_epochs=min_epochs,
                patience=patience,
                monitor=monitor,
                record=record,
            )
        self.phases_done.append(phase)
        return best

    @property
    def train_cpu_s(self) -> float | None:
        """CPU seconds of this client's training in this process; ``None`` where it was only restored."""
        return self.watch.timings["training"]["cpu_s"] if self.watch.timings else None

    def finish(self) -> None:
        """Leave the module in its last local phase, ready to rank, also where a resumed run had nothing left to train."""
        if self.module.local_phases:
            self.module.set_phase(self.module.local_phases[-1])
        self.module.eval()

    def save(self, path: Path) -> None:
        """Write a Lightning checkpoint: with optimiser and counters after a round, weights only after a local phase.

        A client that has not trained since its last file keeps that file's content.
        """
        if self._trainer is not None:
            self._trainer.save_checkpoint(path, weights_only=bool(self.phases_done))
        elif self.saved is not None:
            shutil.copyfile(self.saved, path)
        else:
            raise CheckpointError(f"client '{self.name}' has nothing to save yet")

    def load(self, path: Path) -> None:
        """Put a checkpoint's weights into the module. Optimiser and counters follow at the next :meth:`train_round`."""
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: not a safe checkpoint of this product ({str(error)[:100]})") from None
        self.module.on_load_checkpoint(checkpoint)
        self.module.load_state_dict(checkpoint["state_dict"])
        self.saved = path
