from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.batching import BucketBatchSampler
from lightning_sfubm.datamodules.item_datamodule import ItemDataModule, _Items
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm.titles import mean_title_embeddings
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.prompt_projector import PromptProjector
from lightning_sfubm.seeds import torch_generator

N = 40


class Informative:
    """Item tables from which the title can be read."""

    hidden_dim = 16
    affinity_names = ("score",)

    def __init__(self, titles):
        generator = torch_generator(0, "letters")
        letters = torch.randn(128, 16, generator=generator)
        self.ids = torch.stack([letters[[ord(c) for c in t or " "]].mean(0) for t in titles])

    def item_tables(self):
        return self.ids, self.ids.flip(1)

    def user_states(self, batch):
        return self.ids[batch["history"]].mean(1)

    def affinities(self, batch):
        return self.ids[batch["candidates"]][..., :1]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return str(write_tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="module")
def catalogue():
    generator = torch_generator(0, "titles")
    codes = torch.randint(97, 123, (N, 9), generator=generator)
    titles = ["", *("".join(map(chr, row)) for row in codes.tolist())]
    return Catalogue("x", N, titles, None, torch.zeros(N + 1, dtype=torch.long))


class Items(L.LightningDataModule):
    """The catalogue of the test, in batches of item ids."""

    def train_dataloader(self):
        return DataLoader(_Items(), sampler=BucketBatchSampler(np.ones(N), 20, seed=0), batch_size=None)


def fit(module, epochs):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Items())
    return trainer


def retrieval(projector):
    """Share of items whose soft token is nearest to their own title among all."""
    ids, semantics, titles = projector.id_table[1:], projector.semantic_table[1:], projector.title_table[1:]
    with torch.no_grad():
        soft = projector.tokens.items(ids, semantics)
    soft = torch.nn.functional.normalize(soft - soft.mean(0), dim=-1)
    nearest = (soft @ torch.nn.functional.normalize(titles, dim=-1).T).argmax(1)
    return (nearest == torch.arange(N)).float().mean().item()


def test_mean_title_embeddings_by_hand(llm):
    table, norm = mean_title_embeddings(llm, ["", "ab", "a longer one"], 3)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, weight = (
        AutoTokenizer.from_pretrained(llm),
        AutoModelForCausalLM.from_pretrained(llm).model.embed_tokens.weight,
    )
    ids = tokenizer(" a longer one")["input_ids"][:3]
    torch.testing.assert_close(table[2], weight.detach()[ids].mean(0), atol=1e-2, rtol=0)
    assert table[0].abs().max() == 0
    assert norm > 0


def test_alignment_learns_and_feeds_the_head(llm, catalogue, tmp_path):
    stage1 = Informative(catalogue.titles)
    projector = PromptProjector(llm)
    projector.attach_stage1(stage1, catalogue)
    before = retrieval(projector)
    trainer = fit(projector, 40)
    assert retrieval(projector) > max(0.5, 4 * before)
    trainer.save_checkpoint(tmp_path / "projector.ckpt")

    again = PromptProjector.load_from_checkpoint(tmp_path / "projector.ckpt", weights_only=True)
    for name, value in projector.tokens.state_dict().items():
        assert torch.equal(again.tokens.state_dict()[name], value)

    head = LLMHead(llm, user_token=False, affinity_token=True, projector_checkpoint=str(tmp_path / "projector.ckpt"))
    head.attach_stage1(stage1, catalogue)
    assert torch.equal(head.projector.item_map[0].weight, projector.tokens.item_map[0].weight)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(head)
    trainer.save_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    (tmp_path / "projector.ckpt").unlink()  # what it held is in the head's checkpoint
    restored = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    assert torch.equal(restored.projector.item_map[0].weight, head.projector.item_map[0].weight)


def test_only_projectors_are_trained_and_stored(llm, catalogue):
    projector = PromptProjector(llm)
    projector.attach_stage1(Informative(catalogue.titles), catalogue)
    names = {name.split(".")[0] for name in projector.state_dict()}
    assert names == {"tokens"}


def test_errors(llm, catalogue, tmp_path):
    with pytest.raises(ConfigError, match="temperature"):
        PromptProjector(llm, temperature=0)
    with pytest.raises(ConfigError, match="needs a datamodule"):
        fit(PromptProjector(llm), 1)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a prompt projector"):
        PromptProjector.load_from_checkpoint(tmp_path / "foreign.ckpt", weights_only=True)
    head = LLMHead(llm, projector_checkpoint=str(tmp_path / "foreign.ckpt"))
    with pytest.raises(CheckpointError, match=r"foreign.ckpt does not fit this head.*no parameter"):
        head.attach_stage1(Informative(catalogue.titles), catalogue)
    head = LLMHead(llm, projector_checkpoint=str(tmp_path / "absent.ckpt"))
    with pytest.raises(CheckpointError, match="does not fit"):
        head.attach_stage1(Informative(catalogue.titles), catalogue)


def test_processes_share_the_items_of_an_epoch_and_a_run_that_goes_on_shuffles_as_if_it_had_not_stopped(catalogue):
    def batches(epoch, rank=0, world_size=1):
        items = ItemDataModule(SimpleNamespace(catalogue=catalogue, name="x"), batch_size=20, seed=0)
        items.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        loader = items.train_dataloader()
        loader.sampler.set_epoch(epoch)
        ids = list(loader)
        assert len(ids) == len(loader)
        return ids

    alone, other = batches(0), batches(1)
    everything = torch.arange(1, N + 1)
    for ids in (alone, other):
        assert torch.equal(torch.cat(ids).sort().values, everything)
    assert not torch.equal(torch.cat(alone), torch.cat(other))
    first, second = batches(0, 0, 2), batches(0, 1, 2)
    assert len(first) == len(second)
    assert torch.equal(torch.cat([*first, *second]).unique(), everything)


def test_batches_of_sequences_are_refused_in_a_sentence(llm, catalogue):
    projector = PromptProjector(llm)
    projector.attach_stage1(Informative(catalogue.titles), catalogue)
    with pytest.raises(ConfigError, match=r"PromptProjector is trained on item ids, .* use .*ItemDataModule"):
        projector.training_step({"history": torch.ones(2, 3), "user": torch.arange(2)}, 0)
