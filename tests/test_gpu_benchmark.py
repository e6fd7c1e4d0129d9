"""The benchmark for GPUs runs, tiny and on a CPU, and writes what docs/performance.md would read."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead

ROOT = Path(__file__).resolve().parent.parent
#: one narrow layer in place of the model's own
NARROW = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu/run.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "words", "tied", "parameters"),
    [("1b", 128_256, True, 1_235_814_400), ("7b", 32_000, False, 6_738_415_616)],
)
def test_the_models_have_the_vocabularies_and_sizes_of_those_they_stand_for(
    script: Any, tmp_path: Path, name: str, words: int, tied: bool, parameters: int
) -> None:
    """Llama 3.2 1B and Llama 2 7B: written narrow, counted as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = write_tiny_llm(tmp_path, dtype=torch.bfloat16, **{**script.SHAPES[name], **NARROW})
    head = LLMHead(str(source), form="list", template="movies")
    head.attach_stage1(None, script.catalogue())
    read, scored = (
        module.weight
        for module in (head.lm.causal_lm.get_input_embeddings(), head.lm.causal_lm.get_output_embeddings())
    )
    assert read.shape == scored.shape == (words, 32)
    assert (read is scored) == tied
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32 + 3 * 32  # attention, feed-forward part, norms
    assert script.multiplied(head) == layer  # the words are looked up, and scored at a few positions

    config = AutoConfig.from_pretrained(source)
    config.update(script.SHAPES[name])
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters


@pytest.mark.slow
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
