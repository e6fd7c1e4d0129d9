"""A Lightning trainer whose ``fit`` runs federated rounds when it is given a federation."""

import copy
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_sfubm.callbacks.data_card import DataCardPrinter
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.callbacks.round_logger import RoundLogger
from lightning_sfubm.checkpoints import check_same_settings, resolve
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.checkpoint import find_state
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.evaluation import evaluate_clients, predict_clients, restore_trained, set_top_k
from lightning_sfubm.federated.launch import run_together
from lightning_sfubm.federated.loggers import PrefixedLogger
from lightning_sfubm.federated.loop import FederatedLoop, Federation
from lightning_sfubm.federated.start_checks import check_epochs_can_be_chosen, check_flags, check_text_sizes
from lightning_sfubm.federated.state import OF_SILO
from lightning_sfubm.federated.trainer_flags import TrainerFlags
from lightning_sfubm.federated.twins import train_twins
from lightning_sfubm.federated.workers import WorkerPool, import_ahead
from lightning_sfubm.locks import locked
from lightning_sfubm.modules.encoders.acceptance import check_lengths
from lightning_sfubm.quiet import quiet_lightning
from lightning_sfubm.ranks import first_prepares, is_first
from lightning_sfubm.safe_load import SafeCheckpointIO
from lightning_sfubm.seeds import derive_seed
from lightning_sfubm.training import CloseAtExit, RankSeed, SeededTrainer, check_had_batches

T = TypeVar("T")
log = logging.getLogger(__name__)
_NEEDS = "a federated run needs trainer.federation and a FederatedDataModule with at least one entry in data.domains"


class FederatedTrainer(L.Trainer):
    """:class:`lightning.Trainer` plus ``federation``.

    Without a federation it is Lightning's trainer. With one, the data module must be a
    :class:`~lightning_sfubm.datamodules.federated_datamodule.FederatedDataModule` and the model a module of the federated
    contract: each domain gets a copy of the model and trainers with the same flags (devices, strategy, precision,
    clipping, limits ...), callbacks (copied) and loggers (keys prefixed by the domain), and ``fit`` runs
    :class:`~lightning_sfubm.federated.loop.FederatedLoop`. ``fit(ckpt_path="last")`` goes on from the newest whole
    checkpoint below ``default_root_dir``.

    Args:
        federation: the federated schedule; ``None`` for an ordinary fit.
        kwargs: those of :class:`lightning.Trainer`.
    """

    def __init__(self, *args: Any, federation: Federation | None = None, **kwargs: Any) -> None:
        self.federation = federation
        if federation is not None and federation.workers:
            import_ahead()  # while models and data are made
        self.flags = TrainerFlags(kwargs)  #: what was asked for
        if federation is not None:
            check_flags(kwargs)
            if any(isinstance(c, ModelCheckpoint) for c in self.flags.callbacks):
                raise ConfigError(
                    "a federated run keeps states of its own below trainer.default_root_dir, and of each training the best "
                    "epoch: take ModelCheckpoint out of trainer.callbacks"
                )
            unused = [name for name in ("max_epochs", "min_epochs", "max_steps") if kwargs.get(name) not in (None, -1)]
            if unused:
                log.warning(
                    "trainer.%s has no effect on a federated run: trainer.federation has rounds, local_epochs, "
                    "local_min_epochs and local_max_epochs",
                    " and trainer.".join(unused),
                )
            # Lightning's default logger would open a folder that nothing is written to.
            kwargs["logger"] = kwargs.get("logger") or False
        kwargs.setdefault("use_distributed_sampler", False)  # the batch samplers shard by rank themselves
        kwargs["callbacks"] = [*self.flags.callbacks, CloseAtExit(), RankSeed(self.seed)]
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = SafeCheckpointIO()
        self.loop: FederatedLoop | None = None
        self._twins: dict[int, dict[str, Client]] = {}
        self.config_text = ""  #: configuration of a federated run, where there is one to be kept
        self.settings: dict[str, Any] = {}  #: those of it that a run that goes on must share
        self.client_loggers: dict[str, list[Logger]] = {}

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.default_root_dir)

    @property
    def shared_loggers(self) -> list[Logger]:
        """The loggers that were configured, less CSV ones: each client writes CSV files of its own."""
        return [x for x in self.loggers if not isinstance(x, CSVLogger)]

    @property
    def seed(self) -> int:
        """Root seed: the one of ``seed_everything``, or 0."""
        return self.run_seed or 0

    @property
    def run_seed(self) -> int | None:
        """The seed of ``seed_everything``, where one was set: data modules let the order of batches follow it."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        return int(seed) if seed else None

    def make_trainer(
        self,
        *,
        label: str,
        max_epochs: int,
        callbacks: Iterable[Callback] = (),
        min_epochs: int | None = None,
        folder: Path | None = None,
        client: str | None = None,
        shares: bool = False,
        **overrides: Any,
    ) -> L.Trainer:
        """A plain trainer with this one's flags, for one local round, phase or single-domain method.

        Callbacks with ``rounds_only`` (FedProx, differential privacy of what is shared) are left out unless it ``shares``.
        """
        flags = self.flags.of_training(
            label, callbacks, client is not None, shares, derive_seed(self.seed, "fit", label), overrides
        )
        quiet_lightning()
        return SeededTrainer(
            run_seed=self.run_seed,
            max_epochs=max_epochs,
            min_epochs=min_epochs,
            logger=self._client_loggers(client) if client else False,
            default_root_dir=folder or self.run_dir,
            **flags,
        )

    def make_client(self, name: str, model: L.LightningModule, domain: Any, seed: int) -> Client:
        """A client of a domain, its data set up and its copy of the model bound to it."""
        domain.setup("fit")

        def make_trainer(**kwargs: Any) -> L.Trainer:
            return self.make_trainer(**{"client": name, **kwargs})

        client = Client(name, copy.deepcopy(model), domain, make_trainer, seed)
        for callback in self.flags.callbacks:
            if hasattr(callback, "order_seed"):
                client.order_seed = callback.order_seed(seed, name)
        client.prepare()
        return client

    def build_loop(
        self, model: L.LightningModule, datamodule: Any, federation: Federation | None = None
    ) -> FederatedLoop:
        """Clients and loop for a model template and the data of all domains."""
        federation = federation if federation is not None else self.federation
        if federation is None:
            raise ConfigError(_NEEDS)
        clients = self.build_clients(model, datamodule)
        if len(clients) == 1 and (self.run_dir / OF_SILO).exists():  # goes on from what a silo holds, after its rounds
            federation = federation.of(next(iter(clients)))
        loop = FederatedLoop(
            federation, clients, self.loop_callbacks, self.run_dir, self.seed, self.shared_loggers, self.settings
        )
        if federation.workers and len(clients) > 1:
            if self.world_size > 1:
                raise ConfigError("federation.workers trains clients on one device each: set trainer.devices to 1")
            domains = {name: client.datamodule for name, client in clients.items()}
            flags = self.flags.of_worker()
            loop.workers = WorkerPool(federation.workers, copy.deepcopy(model), domains, flags, self.seed)
        return loop

    @property
    def loop_callbacks(self) -> list[Callback]:
        """Callbacks of a federated loop: those that were configured, and the one that logs rounds."""
        quiet = self.flags.quiet or not is_first()
        return [*self.flags.callbacks, RoundLogger(quiet)]

    def build_clients(self, model: L.LightningModule, datamodule: Any) -> dict[str, Client]:
        """A client for every domain, ready to train, with a copy of the model."""
        domains = getattr(datamodule, "domains", None)
        if not domains:
            raise ConfigError(_NEEDS)
        first_prepares(datamodule)
        return {name: self.make_client(name, model, domain, self.seed) for name, domain in sorted(domains.items())}

    def write_config(self) -> None:
        """Keep the configuration in the run folder; not before the run is sure to start, for another's may lie there."""
        if self.config_text and self.is_global_zero:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_dir / "config.yaml", self.config_text.encode())

    def prepare(self, model: L.LightningModule, datamodule: Any) -> None:
        """Set up clients and loop without running it, and refuse what does not fit them; the run folder stays as it is."""
        quiet_lightning()
        self.loop = self.build_loop(model, datamodule)

    def check_start(self, ckpt_path: str | Path | None) -> None:
        """After :meth:`prepare`: read the state to go on from, and refuse what could not start. Nothing is written before.

        Args:
            ckpt_path: as of :meth:`fit`.

        Raises:
            SFUBMError: see :meth:`~lightning_sfubm.federated.loop.FederatedLoop.go_on`, its ``check_start``, and that of
                :class:`~lightning_sfubm.callbacks.differential_privacy.DifferentialPrivacy`.
        """
        loop = self.loop
        assert loop is not None
        for client in loop.clients.values():
            check_lengths(client.module, client.datamodule)
        federation = loop.federation
        check_epochs_can_be_chosen(
            self, loop.clients, federation.monitor, federation.local_max_epochs, self.flags.callbacks
        )
        if federation.exchange != "nothing":
            check_text_sizes(loop.clients)
        if ckpt_path is not None:
            loop.go_on(ckpt_path)
        loop.check_start()
        if loop.counters.step == 0 and loop.shares_teacher and loop.federation.rounds:
            for callback in self.flags.callbacks:
                if isinstance(callback, DifferentialPrivacy):
                    for name, client in loop.clients.items():
                        epochs = loop.federation.epochs(name)
                        callback.check_start(self, client.module, client.datamodule, epochs)

    def run_rounds(self) -> None:
        """After :meth:`check_start`: keep the configuration, and run the loop to its end."""
        assert self.loop is not None
        self.write_config()
        self.loop.run()

    def local_twin(self, model: L.LightningModule, client: str, number: int = 1) -> Client:
        """The client as trained without any message, the "no transfer" control; trained at first use.

        Args:
            model: template of the stage-1 module.
            client: name.
            number: 2 for a second twin, with a seed of its own, and so on; see
                :func:`~lightning_sfubm.federated.twins.train_twins`.

        Raises:
            ConfigError: there is no federated run.
        """
        if self.loop is None or self.federation is None:
            raise ConfigError("a run without transfer needs the federated run to compare with: call fit first")
        if number not in self._twins:
            self._twins[number] = train_twins(self.loop, model, self.run_dir, number)
        return self._twins[number][client]

    def fit(  # type: ignore[override]
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """As :meth:`lightning.Trainer.fit`; runs the federated loop where there is a federation.

        Raises:
            ConfigError: federation without a FederatedDataModule or a federated model.
            CheckpointError: ``ckpt_path`` has no whole state, or one of another run.
            DataError: there is nothing to train on.
        """
        if self.federation is None:
            path = resolve(self, ckpt_path, fitting=True)
            # A name that is left is of what this very process has trained.
            if path is not None and Path(path).exists():
                check_same_settings(Path(path), self.settings)
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, path, weights_only)
            check_had_batches(self, type(model).__name__)
            return
        if str(ckpt_path) == "last" and not self.run_dir.is_dir():
            find_state(self.run_dir / "checkpoints")  # refuses, and makes no folder
        self.together(self._fit_federation, model, datamodule, ckpt_path)

    def together(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in all processes of the strategy; see :func:`~lightning_sfubm.federated.launch.run_together`.

        Raises:
            ConfigError: another process is at work in the run folder.
        """
        with locked(self.run_dir, "--trainer.default_root_dir") if self.is_global_zero else nullcontext():
            return run_together(self, function, *args, **kwargs)

    def _fit_federation(self, model: L.LightningModule, datamodule: Any, ckpt_path: str | Path | None) -> None:
        self.prepare(model, datamodule)
        self.check_start(ckpt_path)
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DataCardPrinter):
                callback.show(self, datamodule)
        self.run_rounds()

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """As :meth:`lightning.Trainer.validate`, for every client of a federation."""
        if self.federation is None:
            return super().validate(model, dataloaders, resolve(self, ckpt_path), verbose, datamodule, weights_only)
        loop = self._restored(model, datamodule, ckpt_path)
        return evaluate_clients("validate", loop, self.make_trainer, verbose and self.is_global_zero)

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """As :meth:`lightning.Trainer.test`, for every client of a federation."""
        if self.federation is None:
            return super().test(model, dataloaders, resolve(self, ckpt_path), verbose, datamodule, weights_only)
        loop = self._restored(model, datamodule, ckpt_path)
        return evaluate_clients("test", loop, self.make_trainer, verbose and self.is_global_zero)

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
        top_k: PositiveInt = 10,
    ) -> Any:
        """As :meth:`lightning.Trainer.predict`; with a federation, a dict of predictions by client.

        Args:
            model: as there.
            dataloaders: as there.
            datamodule: as there.
            return_predictions: as there.
            ckpt_path: as there, or ``last`` and ``best`` of an earlier process.
            weights_only: as there.
            top_k: items that a model of stage 1 recommends to each user.
        """
        if self.federation is None:
            set_top_k(self.lightning_module if model is None else model, top_k)
            path = resolve(self, ckpt_path)
            return super().predict(model, dataloaders, datamodule, return_predictions, path, weights_only)
        return predict_clients(self._restored(model, datamodule, ckpt_path), self.make_trainer, top_k)

    def _restored(self, model: Any, datamodule: Any, ckpt_path: Any) -> FederatedLoop:
        """The loop whose clients are evaluated: the one that has run, or one that reads a state of an earlier process."""
        quiet_lightning()
        if ckpt_path is None and self.loop is not None:
            return self.loop
        if ckpt_path is None:
            raise CheckpointError(
                f"give --ckpt_path: 'last' for the newest state below {self.run_dir}, or a state folder"
            )
        if self.loop is None:
            self.loop = self.build_loop(model, datamodule)
        restore_trained(self.loop, ckpt_path)
        return self.loop

    def _client_loggers(self, client: str) -> list[Logger]:
        if client not in self.client_loggers:
            csv = CSVLogger(self.run_dir / "csv", name=client)
            self.client_loggers[client] = [csv, *(PrefixedLogger(x, client) for x in self.shared_loggers)]
        return self.client_loggers[client]
