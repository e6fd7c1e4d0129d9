"""A run folder belongs to one run at a time."""

from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.locks import LOCK
from tests.conftest import small_distiller
from tests.test_locks import holder


def test_a_run_folder_belongs_to_one_run_at_a_time(federated_data: Any, federated_trainer: Any, tmp_path: Path) -> None:
    trainer = federated_trainer(rounds=1)
    other = holder(trainer.run_dir)
    with pytest.raises(ConfigError, match=r"another process is at work there.* by --trainer\.default_root_dir$"):
        trainer.fit(small_distiller(), datamodule=federated_data())
    assert [path.name for path in trainer.run_dir.iterdir()] == [LOCK]
    other.communicate()
    for _ in range(2):  # also twice in one process
        federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data())
    assert not (trainer.run_dir / LOCK).exists()


def test_a_folder_that_is_not_there_is_not_gone_on_with(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1)
    with pytest.raises(CheckpointError, match="no federated checkpoint there"):
        trainer.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    assert not trainer.run_dir.exists()
