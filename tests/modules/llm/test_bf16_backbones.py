"""A backbone in bf16 on a CPU, whatever its kind of normalisation: CPU autocast leaves LayerNorm to its own weights."""

import pytest
import torch

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
