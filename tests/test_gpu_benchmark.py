"""The benchmark for GPUs runs, tiny and on a CPU, and writes what docs/performance.md would read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    sizes = ["--rows", "2", "--steps", "3", "--users", "200", "--matrix", "64"]
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu/run.py"),
        "--device",
        "cpu",
        "--models",
        "absent",
        "tiny",
        *sizes,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SFUBM_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "gpu.json")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "not measured: absent" in done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["models"]["absent"]["failed"]  # and what comes after it is measured all the same
    tiny = found["models"]["tiny"]
    assert tiny["tuning_tokens_per_s"] > 0
    assert tiny["ranked_users_per_s"] > 0
    assert 0 < tiny["share_of_matrix_rate"] < 1
    assert found["stage1"]["epochs_per_s"] > 0
    assert found["card"] == "none (CPU)"
