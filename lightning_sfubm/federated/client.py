"""A client: one domain's module, data and trainers. Only what :meth:`Client.uploads` returns ever leaves it."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_sfubm.contracts import FederatedModule
from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError
from lightning_sfubm.privacy.mechanisms import row_hashes
from lightning_sfubm.ranks import is_first, wait_for_all
from lightning_sfubm.safe_load import load_checkpoint
from lightning_sfubm.seeds import derive_seed, numpy_generator
from lightning_sfubm.training import (
    EpochHook,
    EpochRecorder,
    RankSeed,
    Stopwatch,
    TrainerFactory,
    fit_to_early_stopping,
)


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
        self.order_seed = seed  #: root of the order of uploads; a secret where the run's seed is known to the server
        self.saved: Path | None = None
        self.saved_sha256: str | None = None  #: of that file, where it has been computed
        self._linkable = False  # whether the file may get a second name
        self.rounds_done = 0
        self._changed = True  # the module holds something that ``saved`` does not
        self.phases_done: list[str] = []
        self.metrics: dict[str, float] = {}
        self.privacy: dict[str, Any] | None = None  #: guarantee of what the last round trained; ``None`` = none
        self.watch = Stopwatch()
        self.restored = False  #: whether part of the training was done by an earlier process

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

    def text_names(self) -> dict[bytes, bytes]:
        """Hashes of the rows of :meth:`semantics` -> hashes of the texts they are vectors of; ``{}`` where rows hold more.

        A text is encoded to other last bits on another machine. It keeps its name.
        """
        texts = getattr(self.datamodule, "text_names", None)
        if texts is None or not getattr(self.module, "semantics_of_texts", False):
            return {}
        vectors = self.module.semantics()
        # Another module may make another vector of the same text.
        form = f"{type(self.module).__name__} {vectors.shape[1]} ".encode()
        # Where two texts have one vector, either name will do, and always the same.
        return {row: form + text for text, row in sorted(zip(texts, row_hashes(vectors), strict=True), reverse=True)}

    def receive_semantics(self, vectors: Tensor) -> None:
        """Take the server's answer, rows in the private order of :meth:`semantics`."""
        self.module.receive_semantics(self.in_catalogue_order(vectors))
        self._changed = True

    def in_catalogue_order(self, vectors: Tensor) -> Tensor:
        """Rows in the private order of :meth:`semantics`, put back: row i belongs to item i + 1.

        Raises:
            MessageError: there are more rows than items, or fewer.
        """
        items = len(self.module.semantics())
        if len(vectors) != items:
            raise MessageError(f"client '{self.name}' has {items} items and was sent semantics of {len(vectors)} rows")
        restored = torch.empty_like(vectors)
        restored[self._order()] = vectors
        return restored

    def receive_teacher(self, state: dict[str, Tensor]) -> None:
        """Take the server's shared weights."""
        self.module.load_shared_state(state)
        self._changed = True

    def _order(self) -> Tensor:
        # Not a torch.Generator, which keeps 32 bits of its seed: all orders that it can draw can be tried.
        generator = numpy_generator(self.order_seed, "upload order", self.name)
        return torch.from_numpy(generator.permutation(len(self.module.semantics())))

    def train_round(
        self, round: int, rounds: int, epochs: int, folder: Path, record: EpochHook, shares: bool = False
    ) -> None:
        """Train ``epochs`` more epochs of the round phase, going on from the client's file (weights, optimiser, counters).

        The path is the same whether the process has lived since the first round or was restarted.

        Args:
            round: number of the round.
            rounds: of the run.
            epochs: E.
            folder: the client's own.
            record: receives each epoch's metrics.
            shares: whether what is trained leaves the client: then callbacks with ``rounds_only`` take part.
        """
        if self.rounds_done and self._changed:  # the fit below starts from the file, not from the module
            if is_first():
                self.save(folder / "received.ckpt")
            self.saved_as(folder / "received.ckpt")
            wait_for_all()
        self.module.set_phase(self.module.round_phase)
        seed = derive_seed(self.seed, "client", self.name, "round", round)
        torch.manual_seed(seed)
        trainer = self.make_trainer(
            label=f"round {round}/{rounds}, {self.name}",
            max_epochs=(self.rounds_done + 1) * epochs,
            min_epochs=None,
            callbacks=[EpochRecorder(record), RankSeed(seed)],
            folder=folder,
            shares=shares,
        )
        with self.watch("training"):
            state = self.saved if self.rounds_done else None
            trainer.fit(self.module, datamodule=self.datamodule, ckpt_path=state, weights_only=True)
        from lightning_sfubm.callbacks.differential_privacy import privacy_of  # callbacks import this package

        self.privacy = privacy_of(trainer)
        self._keep(trainer, folder / "trained.ckpt", weights_only=False)
        self.rounds_done += 1
        told = ("val/", "privacy/")
        self.metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items()) if k.startswith(told)}

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
        seed = derive_seed(self.seed, "client", self.name, "phase", phase)
        torch.manual_seed(seed)
        with self.watch("training"):
            best, trainer = fit_to_early_stopping(
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
                callbacks=[RankSeed(seed)],
            )
        self._keep(trainer, folder / "trained.ckpt", weights_only=True)
        self.phases_done.append(phase)
        return best

    def take_over(self, path: Path, cpu_s: float) -> None:
        """Take what a worker process has trained for this client."""
        self.load(path)
        self._linkable = True
        entry = self.watch.timings.setdefault("training", {"wall_s": 0.0, "cpu_s": 0.0})
        entry["cpu_s"] += cpu_s

    def _keep(self, trainer: Trainer, path: Path, weights_only: bool) -> None:
        """Write what was trained: with optimiser and counters after a round, weights only after a local phase."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_first():
            path.unlink(missing_ok=True)  # a state folder may know the old file under a second name
        wait_for_all()
        trainer.save_checkpoint(path, weights_only=weights_only)
        self.saved, self.saved_sha256, self._changed, self._linkable = path, None, False, True

    @property
    def train_cpu_s(self) -> float | None:
        """CPU seconds of this client's training; ``None`` where a part of it was done before a resume."""
        return self.watch.timings["training"]["cpu_s"] if self.watch.timings and not self.restored else None

    def finish(self) -> None:
        """Leave the module in its last local phase, ready to rank, also where a resumed run had nothing left to train."""
        if self.module.local_phases:
            self.module.set_phase(self.module.local_phases[-1])
        self.module.eval()

    def saved_as(self, path: Path) -> None:
        """Note that a file holds all that the module holds: written, renamed, or written by the first process."""
        self.saved, self._changed = path, False

    def save(self, path: Path, link: bool = False) -> None:
        """Write the client's state as a Lightning checkpoint: its last training's, with the weights the module holds now.

        Args:
            path: of the new file.
            link: whether a file that says all there is to say may get a second name instead of a copy. One written
                without is never linked to, so that it shares its content with no other.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.saved is not None and not self._changed:
            _copy(self.saved, path, link and self._linkable)
        else:
            blank: dict[str, Any] = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
            state = blank if self.saved is None else load_checkpoint(self.saved)
            state["state_dict"] = self.module.state_dict()
            self.module.on_save_checkpoint(state)
            temporary = path.with_suffix(".tmp")  # ``saved`` may be this very file
            torch.save(state, temporary)
            temporary.replace(path)
            self.saved_sha256 = None
        self.saved_as(path)
        self._linkable = link

    def load(self, path: Path) -> None:
        """Put a checkpoint's weights into the module. Optimiser and counters follow at the next :meth:`train_round`.

        Raises:
            CheckpointError: the file is torn, unsafe, or of another model.
        """
        checkpoint = load_checkpoint(path)
        self.module.on_load_checkpoint(checkpoint)
        try:
            self.module.load_state_dict(checkpoint["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: does not fit the model of client '{self.name}' ({reason})") from None
        self.saved, self.saved_sha256, self._changed, self._linkable = path, None, False, False


def _copy(source: Path, target: Path, link: bool) -> None:
    """Copy a file, or give it a second name: client files are never written again under the name they have."""
    if target.exists():
        if target.samefile(source):
            return
        target.unlink()
    if link:
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)
