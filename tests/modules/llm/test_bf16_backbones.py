"""A backbone in bf16 on a CPU, whatever its kind of normalisation: CPU autocast leaves LayerNorm to its own weights."""

from pathlib import Path

import pytest
import torch

from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.norms import FrozenRMSNorm
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
    exact = Backbone(folder, precision="32", adapter_rank=2, adapter_dropout=0.0)
    adapters = {name: 0.1 * torch.randn_like(p) for name, p in exact.named_parameters() if p.requires_grad}
    embeddings, mask = torch.randn(2, 7, exact.embedding_dim), torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    once, plain = (Backbone(folder, precision="bf16", adapter_rank=2, adapter_dropout=0.0) for _ in range(2))
    casting = 0
    for module in plain.modules():
        if isinstance(module, FrozenRMSNorm) and module.dtype is not None:
            casting, module.dtype = casting + 1, None
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    assert casting == 2 * once.causal_lm.config.num_hidden_layers
    states, gradients = [], []
    for backbone in (exact, plain, once):
        backbone.load_state_dict(adapters, strict=False)
        states.append(backbone.states(embeddings, mask, torch.arange(7).expand(2, 7)))
        (states[-1] * torch.linspace(-1, 1, states[-1].numel()).view_as(states[-1])).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    assert torch.equal(states[2], states[1])
    before, now = ((gradient - gradients[0]).norm() / gradients[0].norm() for gradient in gradients[1:])
    assert 0 < now < 1.25 * before < 0.2
