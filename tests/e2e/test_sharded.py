"""An LLM head divided among two processes trains as one process does on the double batch (T8, T9)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from tests.modules.llm.stand_ins import FixedStage1, batch_of, tiny_catalogue

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run(llm: Path, out: Path, name: str, form: str) -> dict[str, Any]:
    inherited = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "tests/e2e/sharded_head.py"), str(llm), str(out), name, form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / f"{name}-{form}.pt", weights_only=True)


@pytest.mark.parametrize("form", ["branch", "list", "constrained"])
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path, form: str) -> None:
    llm = write_tiny_llm(tmp_path / "llm")
    one = run(llm, tmp_path, "one", form)
    for name in ("ddp", "sharded"):
        two = run(llm, tmp_path, name, form)
        assert two["without"] == one["without"] == []  # every adapter parameter has had a gradient
        torch.testing.assert_close(two["scores"], one["scores"], rtol=1e-3, atol=1e-3)
        assert two["factor"] == pytest.approx(one["factor"], rel=1e-2)
        if name == "sharded":
            assert two["largest"] <= one["largest"] // 2 + 1024  # each holds half
        # One file, which a single process reads.
        head = LLMHead.load_from_checkpoint(tmp_path / f"{name}-{form}.ckpt", weights_only=True)
        head.attach_stage1(FixedStage1(), tiny_catalogue())
        torch.testing.assert_close(head.rank(batch_of(rows=4, seed=9)), two["scores"], rtol=1e-4, atol=1e-4)
        head.export_adapter(tmp_path / f"{name}-{form}-adapter")
        assert (tmp_path / f"{name}-{form}-adapter" / "adapter_model.safetensors").is_file()
