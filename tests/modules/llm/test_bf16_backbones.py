"""A backbone in bf16 on a CPU, whatever its kind of normalisation: CPU autocast leaves LayerNorm to its own weights."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm.tree import supports_tree
from tests.modules.llm.test_llm_parts import prompts_for


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "gemma3"])
def test_states_are_those_of_fp32_to_rounding(tmp_path, catalogue, make_batch, architecture):
    folder = str(write_tiny_llm(tmp_path / "llm", architecture))
    states, trees = [], []
    for precision in ("32", "bf16"):
        backbone = Backbone(folder, precision=precision)
        empty = torch.zeros(3, 0, dtype=torch.long)
        prompts, _ = prompts_for(backbone, catalogue, make_batch(rows=3), "list", branches=empty)
        embeddings = backbone.embed(prompts.tokens).requires_grad_()
        found = backbone.states(embeddings, prompts.branch >= 0, prompts.positions)
        real = found[prompts.branch >= 0]
        real.square().sum().backward()
        assert torch.isfinite(embeddings.grad).all()
        states.append(real.detach())
        trees.append(supports_tree(backbone))
    off = (states[1] - states[0]).norm() / states[0].norm()
    assert 0 < off < 0.05
    assert trees[0] == trees[1]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_inputs_of_linear_layers_are_cast_once_and_mean_the_same(architecture: str, tmp_path: Path) -> None:
    folder = str(write_tiny_llm(tmp_path / "llm", architecture))
    torch.manual_seed(0)
    once = Backbone(folder, precision="bf16", adapter_rank=2, adapter_dropout=0.0)
    for name, parameter in once.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # else nothing of the adapters' own inputs would count
    plain = copy.deepcopy(once)
    hooks = 0
    for module in plain.modules():
        hooks += len(module._forward_hooks)
        module._forward_hooks.clear()
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    assert hooks == 2 * once.causal_lm.config.num_hidden_layers
    embeddings, mask = torch.randn(2, 7, once.embedding_dim), torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    found = []
    for backbone in (once, plain):
        states = backbone.states(embeddings, mask, torch.arange(7).expand(2, 7))
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append((states, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[1][1].items():
        assert (found[0][1][name] - gradient).norm() < 0.03 * gradient.norm(), name
