"""What tests of silos and coordinator share."""

from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.federated.silo import Silo
from tests.conftest import small_distiller
from tests.federated.machines import Machines


@pytest.fixture
def machines(federated_data: Any, federated_trainer: Any, tmp_path: Path) -> Any:
    """A factory of :class:`Machines`; keyword arguments go to Federation."""

    def make(names: list[str], callbacks: Any = (), folder: str = "", **federation: Any) -> Machines:
        def open_one(name: str) -> Silo:
            noise = PrivacyNoise(0.05, str(tmp_path / "secrets"))
            trainer = federated_trainer(f"silo{folder}/{name}", callbacks=[noise, *callbacks], **federation)
            data = federated_data(domains=3, num_users=30)
            data.domains = {name: data.domains[name]}
            client = trainer.build_clients(small_distiller(), data)[name]
            return Silo(trainer.federation, client, trainer.loop_callbacks, trainer.run_dir, trainer.seed)

        return Machines({name: lambda name=name: open_one(name) for name in names})

    return make


@pytest.fixture
def in_one_process(federated_data: Any, federated_trainer: Any, tmp_path: Path) -> Any:
    """A factory of finished loops of the same schedule."""

    def run(names: list[str], callbacks: Any = (), **federation: Any) -> Any:
        noise = PrivacyNoise(0.05, str(tmp_path / "secrets"))
        trainer = federated_trainer("together", callbacks=[noise, *callbacks], **federation)
        data = federated_data(domains=3, num_users=30)
        data.domains = {name: data.domains[name] for name in names}
        trainer.fit(small_distiller(), datamodule=data)
        return trainer

    return run
