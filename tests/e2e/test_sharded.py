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
from lightning_sfubm.safe_load import load_checkpoint
from tests.modules.llm.stand_ins import FixedStage1, batch_of, tiny_catalogue
from tests.test_configs import prepared

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


@pytest.mark.parametrize("form", ["branch", "list", "constrained", "generate"])
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path, form: str) -> None:
    # What is written freely has no room for the longest answer behind the longest prompts.
    llm = write_tiny_llm(tmp_path / "llm", **({"max_position_embeddings": 240} if form == "generate" else {}))
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


def test_the_shipped_file_divides_a_head(tmp_path: Path) -> None:
    arguments = prepared(ROOT / "configs" / "trainer" / "sharded.yaml", tmp_path)
    llm = str(write_tiny_llm(tmp_path / "llm"))
    arguments += ["--model.init_args.llm", llm, "--model.init_args.num_layers", "null", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.limit_train_batches", "2", "--trainer.default_root_dir", str(tmp_path / "run")]
    inherited = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "PL_GLOBAL_SEED")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SFUBM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "lightning_sfubm", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    stored = load_checkpoint(checkpoint)["state_dict"]  # one ordinary file, of whole tensors
    head = LLMHead(llm=llm, template="movies", adapter_targets=r".*\.(q|k|v|o)_proj")
    head.attach_stage1(None, tiny_catalogue())
    whole = {name: parameter.shape for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert {name: value.shape for name, value in stored.items() if name in whole} == whole
    assert any(value.abs().sum() > 0 for name, value in stored.items() if "lora_B" in name)  # and it was trained
