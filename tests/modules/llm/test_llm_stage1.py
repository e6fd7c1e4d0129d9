"""A real stage 1, written to a checkpoint and read back by stage 2."""

from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.stage1 import load_stage1
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.prompt_projector import PromptProjector
from lightning_sfubm.modules.sequential import SequentialRecommender


class Ranking(L.LightningDataModule):
    """A datamodule with a catalogue and nothing else but the given batches."""

    def __init__(self, catalogue, batches):
        super().__init__()
        self.catalogue, self.batches = catalogue, batches

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


@pytest.fixture
def checkpoint(catalogue, tmp_path):
    module = SequentialRecommender(SASRec(hidden_dim=16))
    module.bind(catalogue)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "stage1.ckpt")
    return module.eval(), str(tmp_path / "stage1.ckpt")


def test_head_starts_at_the_loaded_stage1_and_never_stores_it(llm, catalogue, make_batch, checkpoint, tmp_path):
    module, path = checkpoint
    batch = make_batch()
    head = LLMHead(llm, template="movies", stage1_checkpoint=path, precision="32")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(head, Ranking(catalogue, [batch]))
    (stage1,) = head._stage1
    assert torch.equal(stage1.rank(batch), module.rank(batch))
    assert all(torch.equal(value, before[name]) for name, value in stage1.state_dict().items())
    assert not stage1.training
    assert not any("stage1" in name or "encoder" in name for name in head.state_dict())
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    again = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(load_stage1(path, catalogue), catalogue)
    torch.testing.assert_close(again.rank(batch), head.rank(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [LLMHead, PromptProjector])
def test_another_domain_than_the_attached_one_is_refused(llm, catalogue, stage1, kind):
    module = kind(llm)
    module.attach_stage1(stage1, catalogue)
    same = replace(catalogue, titles=list(catalogue.titles))
    module.trainer = SimpleNamespace(datamodule=Ranking(same, []))
    module.setup("fit")
    fewer = replace(catalogue, num_items=29, titles=catalogue.titles[:-1])
    renamed = replace(catalogue, titles=[*catalogue.titles[:-1], "another film"])
    for other, what in ((replace(catalogue, name="shop"), "name"), (fewer, "num_items"), (renamed, "titles")):
        module.trainer = SimpleNamespace(datamodule=Ranking(other, []))
        with pytest.raises(ConfigError, match=rf"attached to domain 'tiny'.*\({what} differs\)"):
            module.setup("fit")


def test_untrained_head_equals_stage1(llm, catalogue, make_batch, checkpoint):
    module, path = checkpoint
    head = LLMHead(llm, template="movies", precision="32")
    head.attach_stage1(load_stage1(path, catalogue), catalogue)
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(head.rank(batch).argsort(1), module.rank(batch).argsort(1))


def test_bad_checkpoints(catalogue, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        load_stage1(tmp_path / "absent.ckpt", catalogue)
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointError, match="not a safe checkpoint"):
        load_stage1(tmp_path / "torn.ckpt", catalogue)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a stage-1 module"):
        load_stage1(tmp_path / "other.ckpt", catalogue)
    torch.save({"stage1_shapes": {"module": "os.system"}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"holds a 'os\.system'"):
        load_stage1(tmp_path / "foreign.ckpt", catalogue)
