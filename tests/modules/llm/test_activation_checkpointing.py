"""Layers computed a second time in training: less is kept, gradients are the same, and nothing else changes."""

import pytest
import torch

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.llara import LLaRA
from lightning_sfubm.modules.llm import backbone as backbones
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from tests.modules.llm.stand_ins import FixedStage1


def gradients(head: LLMHead, batch) -> tuple[dict[str, torch.Tensor], int]:
    """Of all trainable parameters, and the bytes that were kept for them."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    head.train()
    torch.manual_seed(0)  # the adapters' dropout: drawn once, and the same again when a layer is computed again
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = head.loss(batch)
    loss.backward()
    found = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    return found, sum(kept.values())


@pytest.mark.parametrize("form", ["branch", "list"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_gradients_are_the_same_and_less_is_kept(tmp_path, architecture, form, catalogue, stage1, make_batch):
    folder = str(write_tiny_llm(tmp_path / "llm", architecture))
    batch = make_batch()
    outcomes = []
    for again in (False, True):
        head = LLMHead(
            folder, form=form, template="movies", adapter_dropout=0.2, precision="32", activation_checkpointing=again
        )
        head.attach_stage1(stage1, catalogue)
        if head.head is not None:  # zero at the start, and so would be all gradients behind it
            torch.nn.init.ones_(head.head.weight)
        outcomes.append(gradients(head, batch))
    (plain, much), (checkpointed, little) = outcomes
    assert plain.keys() == checkpointed.keys()
    assert any("lora" in name and gradient.abs().max() > 0 for name, gradient in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)
    assert little < 0.8 * much


def test_ranking_and_generation_are_untouched(llm, catalogue, stage1, make_batch):
    batch = make_batch()
    scores = []
    for again in (False, True):
        head = LLMHead(llm, form="list", template="movies", rank_mode="constrained", activation_checkpointing=again)
        head.attach_stage1(stage1, catalogue)
        head.eval()
        scores.append(head.rank(batch))
    assert torch.equal(*scores)


def test_published_methods_take_it_from_the_configured_head(llm, catalogue, make_batch):
    head = LLMHead(llm, template="movies", activation_checkpointing=True)
    row = LLaRA.from_head(head.hparams)
    row.attach_stage1(FixedStage1(), catalogue)
    layers = [m for m in row.modules() if getattr(m, "gradient_checkpointing", False)]
    assert len(layers) >= row.lm.config.num_hidden_layers


def test_a_model_that_cannot_is_one_sentence(llm, monkeypatch):
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr("transformers.LlamaPreTrainedModel.supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"cannot compute its layers again .*leave out activation_checkpointing"):
        backbones.Backbone(llm, precision="32", activation_checkpointing=True)
