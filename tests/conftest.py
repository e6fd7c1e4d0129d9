"""What all tests share: one thread, a cache of their own, and the small planted federation."""

import os
import warnings
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def federated_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A factory of small planted federations: ``federated_data(domains=2, num_users=60, ...)``."""
    from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
    from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
    from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader

    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))

    def make(domains: int = 2, num_users: int = 60, num_items: int = 48, **settings: Any) -> FederatedDataModule:
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

    return make


@pytest.fixture
def federated_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A factory of quiet federated trainers; keyword arguments go to Federation, ``callbacks`` to the trainer."""
    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
    from lightning_sfubm.federated.loop import Federation
    from lightning_sfubm.federated.trainer import FederatedTrainer

    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def make(folder: str = "run", callbacks: list | None = None, flags: dict | None = None, **federation: Any) -> Any:
        settings = {
            "exchange": "both",
            "rounds": 2,
            "local_max_epochs": 2,
            "local_min_epochs": 1,
            "patience": 1,
            **federation,
        }
        return FederatedTrainer(
            federation=Federation(**settings),
            default_root_dir=tmp_path / folder,
            accelerator="cpu",
            callbacks=[PrivacyNoise(0.05)] if callbacks is None else callbacks,
            **{"enable_progress_bar": False, **(flags or {})},
        )

    return make


def small_distiller(**settings: Any) -> Any:
    """A stage-1 module that trains in a second."""
    from lightning_sfubm.modules.encoders.sasrec import SASRec
    from lightning_sfubm.modules.fkd import FKDDistiller

    torch.manual_seed(0)
    encoder = SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=16, dropout=0.1)
    return FKDDistiller(encoder, num_experts=2, **settings)
