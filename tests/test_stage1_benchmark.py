"""The benchmark of stage 1: what its epochs are compared with."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import SyntheticReader

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "stage1.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the script sets it
    spec = importlib.util.spec_from_file_location("stage1_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("native", [True, False])
def test_the_plain_loop_has_the_number_formats_that_ours_has(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: bool
) -> None:
    dtype = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr(script, "matmul_dtype", lambda *_: dtype)
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path))
    formats = set()

    class Watched(script.PlainLoss):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            formats.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    monkeypatch.setattr(script, "PlainLoss", Watched)
    data = DomainDataModule(
        "shop", SyntheticReader(0, num_users=60, num_items=40, mean_length=8), k_core=0, batch_size=8
    )
    data.prepare_data()
    data.setup()
    times = script.epoch_times(data, rounds=1, steps=2)
    assert formats == {torch.float32, dtype}
    assert ("plain, bf16 autocast" in times) == native


def test_ours_is_compared_with_the_faster_plain_loop(script: Any) -> None:
    times = {"chunked, auto": 5.0, "chunked, fp32": 8.0, "plain, fp32": 25.0, "GRU4Rec, chunked, auto": 4.0}
    assert script.ratio_to_plain(times) == 0.2
    assert script.ratio_to_plain({**times, "plain, bf16 autocast": 20.0}) == 0.25
    assert script.ratio_to_plain({**times, "plain, bf16 autocast": 50.0}) == 0.2
