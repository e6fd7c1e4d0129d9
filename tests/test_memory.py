"""Memory that was freed goes back to the system between epochs."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm import memory
from lightning_sfubm.modules import stage1
from tests.conftest import small_distiller


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps it and can be told not to")
def test_freed_blocks_are_handed_back() -> None:
    memory.hand_back()
    blocks = [torch.ones(25_000) for _ in range(2000)]  # 100 kB each: below the size that is mapped apart
    kept = blocks[::50]
    full = resident_mb()
    del blocks
    held = resident_mb()
    assert memory.hand_back()
    assert resident_mb() < min(held, full - 150)  # of 200 MB; what lies between the kept blocks too
    assert all(block.sum() == 25_000 for block in kept)


def test_every_epoch_of_a_module_on_a_cpu_ends_with_it(
    monkeypatch: pytest.MonkeyPatch, federated_data: Any, federated_trainer: Any
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(stage1, "hand_back", lambda: calls.append(1))
    trainer = federated_trainer(rounds=2, local_max_epochs=1)
    trainer.fit(small_distiller(), datamodule=federated_data(domains=1, num_users=30))
    assert len(calls) == 4  # two rounds, teacher, student
