"""Two processes take the steps of one process with the double batch, and measure the same (T9)."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.sequential import SequentialRecommender

pytestmark = pytest.mark.slow


def domain(batch_size: int) -> DomainDataModule:
    # 75 users: batches of unequal sums of lengths, a last one that is short, and validation shards of 38 and 37
    reader = SyntheticReader(num_users=75, num_items=40, mean_length=9)
    return DomainDataModule(
        "films", reader, text_encoder=HashingTextEncoder(dim=16), k_core=0, max_length=12, batch_size=batch_size
    )


def sasrec() -> SASRec:
    return SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=12, dropout=0.0)


def recommender() -> SequentialRecommender:
    return SequentialRecommender(sasrec(), features="id+text", lr=1e-2, logits_precision="fp32")


def gru4rec() -> SequentialRecommender:
    encoder = GRU4Rec(hidden_dim=16, dropout=0.0)
    return SequentialRecommender(encoder, loss="sampled", num_negatives=8, lr=1e-2, logits_precision="fp32")


def distiller() -> FKDDistiller:
    return FKDDistiller(sasrec(), num_experts=1, phase="joint", lr=1e-2, logits_precision="fp32")


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(processes: int) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=processes,
            # the gate between local and global text has nothing to do before a federation has sent anything
            strategy="auto" if processes == 1 else "ddp_spawn_find_unused_parameters_true",
            max_epochs=2,
            default_root_dir=tmp_path,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    return make


@pytest.mark.parametrize("build", [recommender, gru4rec, distiller])
def test_two_processes_equal_one_with_the_double_batch(trainer: Any, build: Any) -> None:
    torch.manual_seed(0)
    template, weights, metrics = build(), {}, {}
    for processes in (1, 2):
        module, data, fit = copy.deepcopy(template), domain(batch_size=16 // processes), trainer(processes)
        data.prepare_data()
        data.setup("fit")
        module.bind(data.catalogue)  # here too: a spawned process sends its weights back to this one
        start = copy.deepcopy(module.state_dict())
        fit.fit(module, datamodule=data)
        weights[processes] = module.state_dict()
        metrics[processes] = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("val/")}
    for name, value in weights[1].items():
        other = weights[2][name]
        if name.endswith(
            "attention.qkv.bias"
        ):  # a bias of keys has no gradient but rounding, and Adam's steps are as long
            value, other = (torch.cat([b[:16], b[32:]]) for b in (value, other))
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any(name.startswith("encoder.") and not torch.equal(v, start[name]) for name, v in weights[1].items())
    assert metrics[1].keys() > {"val/ndcg@10", "val/full_ndcg@10"}
    assert metrics[2] == pytest.approx(metrics[1], abs=1e-4)
