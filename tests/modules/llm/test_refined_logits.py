"""Logits that bf16 makes equal are told apart where a row answers in words."""

import pytest
import torch

from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.list_ranking import greedy
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from tests.modules.llm.test_llm_parts import prompts_for


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_refined_logits_are_those_of_fp32(tmp_path, architecture):
    backbone = Backbone(str(write_tiny_llm(tmp_path / "llm", architecture)), precision="bf16")
    states = 4 * torch.randn(6, backbone.hidden_dim, generator=torch.Generator().manual_seed(0))
    coarse, tokens = backbone.logits(states).topk(5)
    head = backbone.causal_lm.get_output_embeddings()
    exact = torch.nn.functional.linear(states, head.weight.float()).gather(1, tokens)
    if (cap := getattr(backbone.config, "final_logit_softcapping", None)) is not None:
        exact = torch.tanh(exact / cap) * cap
    refined = backbone.refined(coarse, states, tokens)
    torch.testing.assert_close(refined, exact)
    assert (coarse - exact).abs().max() > 100 * (refined - exact).abs().max()
    masked = coarse.clone()
    masked[:, 2] = float("-inf")
    assert backbone.refined(masked, states, tokens)[:, 2].isinf().all()


def test_a_backbone_in_fp32_keeps_its_logits(llm):
    backbone = Backbone(llm, precision="32")
    states = torch.randn(3, backbone.hidden_dim)
    coarse, tokens = backbone.logits(states).topk(4)
    assert backbone.refined(coarse, states, tokens) is coarse


def test_generation_takes_the_better_of_two_tokens_that_bf16_makes_equal(llm, monkeypatch, catalogue, make_batch):
    backbone = Backbone(llm, precision="bf16")
    state = torch.zeros(backbone.hidden_dim)
    state[:2] = torch.tensor([16.0, 1.0])
    weight = backbone.causal_lm.get_output_embeddings().weight
    with torch.no_grad():
        weight.zero_()
        weight[7, 0] = weight[11, 0] = 1.0
        weight[11, 1] = 1 / 32  # 16 and 16.03, of which bf16 makes 16 and 16
    assert backbone.logits(state[None])[0, [7, 11]].tolist() == [16.0, 16.0]
    monkeypatch.setattr(backbone, "states", lambda embeddings, *_: state.expand(*embeddings.shape[:2], -1))
    empty = torch.zeros(2, 0, dtype=torch.long)
    prompts, _ = prompts_for(backbone, catalogue, make_batch(rows=2), "list", branches=empty)
    answers = greedy(backbone, backbone.embed(prompts.tokens), prompts, 2, backbone.tokenizer.eos_token_id)
    assert answers == [[11, 11], [11, 11]]
