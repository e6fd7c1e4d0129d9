"""What all tests share: one thread, a cache of their own, and the small planted federation."""

import builtins
import errno
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: the cores that this process may use, four at most (each holds up to 3 GB)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Close files below a path to this process, which may be root's: to open one is a PermissionError from then on."""

    def close(folder: Path) -> None:
        def opening(file: Any, *given: Any, plain: Any = open, **named: Any) -> Any:
            if isinstance(file, (str, Path)) and (Path(file) == folder or folder in Path(file).parents):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return plain(file, *given, **named)

        monkeypatch.setattr(builtins, "open", opening)
        monkeypatch.setattr(io, "open", opening)

    return close


def small_federation(domains: int = 2, num_users: int = 60, num_items: int = 48, **settings: Any) -> Any:
    """Data of a small planted federation; its cache is where SFUBM_CACHE says when it is prepared."""
    from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
    from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
    from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader

    names = ["alpha", "beta", "gamma", "delta"][:domains]
    return FederatedDataModule(
        {
            name: DomainDataModule(
                name,
                SyntheticReader(index, num_users=num_users, num_items=num_items, mean_length=10),
                text_encoder=HashingTextEncoder(dim=32),
                **{"k_core": 0, "batch_size": 16, "stage2_positions": 1, "max_length": 16, **settings},
            )
            for index, name in enumerate(names)
        }
    )


def quiet_trainer(run_dir: Path, callbacks: list | None = None, flags: dict | None = None, **federation: Any) -> Any:
    """A federated trainer of short schedules; keyword arguments go to Federation, ``flags`` to the trainer."""
    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
    from lightning_sfubm.federated.loop import Federation
    from lightning_sfubm.federated.trainer import FederatedTrainer

    schedule = {"exchange": "both", "rounds": 2, "local_max_epochs": 2, "local_min_epochs": 1, "patience": 1}
    return FederatedTrainer(
        federation=Federation(**{**schedule, **federation}),
        default_root_dir=run_dir,
        accelerator="cpu",
        callbacks=[PrivacyNoise(0.05)] if callbacks is None else callbacks,
        **{"enable_progress_bar": False, **(flags or {})},
    )


@pytest.fixture
def federated_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A factory of small planted federations: ``federated_data(domains=2, num_users=60, ...)``."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    return small_federation


@pytest.fixture
def federated_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A factory of quiet federated trainers below this test's folder: ``federated_trainer("run", rounds=1, ...)``."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def make(folder: str = "run", *args: Any, **settings: Any) -> Any:
        return quiet_trainer(tmp_path / folder, *args, **settings)

    return make


def small_distiller(**settings: Any) -> Any:
    """A stage-1 module that trains in a second."""
    from lightning_sfubm.modules.encoders.sasrec import SASRec
    from lightning_sfubm.modules.fkd import FKDDistiller

    torch.manual_seed(0)
    encoder = SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=16, dropout=0.1)
    return FKDDistiller(encoder, num_experts=2, **settings)
