"""Memory that was freed goes back to the system between epochs."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm import memory
from lightning_sfubm.modules import stage1
from tests.conftest import small_distiller

ROOT = Path(__file__).resolve().parents[1]


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


GROW_AND_FREE = """
import torch
from lightning_sfubm.memory import hand_back, keep_freed
from tests.test_memory import resident_mb
kept = keep_freed()
for _ in range(5):
    blocks = [torch.ones(2_000_000) for _ in range(8)]  # 8 MB each
    full = resident_mb()
    del blocks
held = resident_mb()
hand_back()
print(kept, full - held, full - resident_mb())
"""


def freed(**variables: str) -> tuple[str, float, float]:
    """In a fresh process: what :func:`keep_freed` said, MB given back by themselves when 64 were freed, and by handing back."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", GROW_AND_FREE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | variables, cwd=ROOT)
    kept, by_itself, in_all = done.stdout.split()
    return kept, float(by_itself), float(in_all)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives it back by itself")
def test_what_a_step_has_freed_is_there_for_the_next() -> None:
    kept, by_itself, in_all = freed()
    assert kept == "True"
    assert by_itself < 10
    assert in_all > 40
    kept, by_itself, _ = freed(MALLOC_MMAP_THRESHOLD_="65536")
    assert kept == "False"  # the user's own setting stands
    assert by_itself > 40


def test_training_on_a_cpu_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, federated_data: Any, federated_trainer: Any
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(stage1, "keep_freed", lambda: calls.append(1))
    federated_trainer(rounds=1, local_max_epochs=1).fit(
        small_distiller(), datamodule=federated_data(domains=1, num_users=30)
    )
    assert calls


def test_every_epoch_of_a_module_on_a_cpu_ends_with_it(
    monkeypatch: pytest.MonkeyPatch, federated_data: Any, federated_trainer: Any
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(stage1, "hand_back", lambda: calls.append(1))
    trainer = federated_trainer(rounds=2, local_max_epochs=1)
    trainer.fit(small_distiller(), datamodule=federated_data(domains=1, num_users=30))
    assert len(calls) == 4  # two rounds, teacher, student
