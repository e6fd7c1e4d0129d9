"""A base of 8 or 4 bits: close to the whole one, trained through its adapters, stored without it."""

import sys

import lightning as L
import pytest
import torch

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.llm import sharding
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Wide enough for blocks of 64 weights: bitsandbytes' own error on smaller matrices is several times as large."""
    folder = tmp_path_factory.mktemp("llm")
    return str(write_tiny_llm(folder, hidden_size=64, intermediate_size=128, head_dim=16))


def make(llm, stage1, catalogue, precision, **options):
    settings = {"template": "movies", "history_length": 4, "title_tokens": 8, "adapter_dropout": 0.0, **options}
    head = LLMHead(llm, precision=precision, **settings)
    head.attach_stage1(stage1, catalogue)
    return head.eval()


@pytest.mark.parametrize(
    ("precision", "kind", "of_layer", "of_scores"),
    [("8bit", "Linear8bitLt", 0.03, 0.95), ("4bit", "Linear4bit", 0.15, 0.5)],
)
def test_layers_and_scores_are_near_the_whole_models(llm, catalogue, make_batch, precision, kind, of_layer, of_scores):
    heads = [make(llm, None, catalogue, each, rank_mode="score", tuning="frozen") for each in ("32", precision)]
    layers = [{n: m for n, m in head.lm.named_modules() if n.endswith("_proj")} for head in heads]
    assert len(layers[0]) == 14
    for name, whole in layers[0].items():
        assert type(layers[1][name]).__name__ == kind
        inputs = torch.randn(64, whole.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = whole(inputs)
            off = (layers[1][name](inputs).float() - outputs).norm() / outputs.norm()
        assert 0 < off < of_layer, name
    whole_scores, scores = (head.rank(make_batch(rows=8)).flatten() for head in heads)
    assert torch.corrcoef(torch.stack([whole_scores, scores]))[0, 1] > of_scores


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_trains_is_stored_and_read(llm, stage1, catalogue, make_batch, precision, tmp_path):
    head = make(llm, stage1, catalogue, precision, adapter_learning_rate=1e-2, head_learning_rate=1e-1)
    head.rank(make_batch())  # as a validation before training does
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(head, torch.utils.data.DataLoader([make_batch(seed=i) for i in range(4)], batch_size=None))
    changed = {name for name, p in head.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert changed <= trained
    assert {name for name in trained if "lora" in name or name == "head.weight"} <= changed
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    stored = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, p in head.named_parameters() if p.requires_grad}
    again = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(stage1, catalogue)
    whole = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", precision="32", weights_only=True)
    assert not whole.lm.quantized
    batch = make_batch(rows=4, seed=9)
    torch.testing.assert_close(again.eval().rank(batch), head.eval().rank(batch), atol=1e-4, rtol=1e-4)


def test_needs_its_package_and_cannot_be_divided(llm, catalogue, monkeypatch):
    head = make(llm, None, catalogue, "4bit")
    with pytest.raises(ConfigError, match="cannot be divided"):
        sharding.shard(head, head.lm, mesh=None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"lightning-sfubm\[quantized\]"):
        LLMHead(llm, precision="8bit").attach_stage1(None, catalogue)
    with pytest.raises(ConfigError, match="not one of auto, bf16, 32, 8bit, 4bit"):
        LLMHead(llm, precision="2bit").attach_stage1(None, catalogue)
