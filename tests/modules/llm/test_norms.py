"""Norms of a frozen model: what transformers computes, with exact gradients, and only where it is the same norm."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.norms import FrozenRMSNorm, use_frozen_norms
from lightning_sfubm.modules.llm.tiny import write_tiny_llm

WIDTH = 24


def frozen(dtype: torch.dtype = torch.float32, out: torch.dtype | None = None) -> FrozenRMSNorm:
    weight = torch.linspace(0.5, 2, WIDTH).to(dtype)
    return FrozenRMSNorm(nn.Parameter(weight, requires_grad=False), 1e-5, out)


def exact(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of x in float64, by autograd."""
    x = x.detach().double().requires_grad_()
    out = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out.backward(gradient.double())
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize(
    ("inputs", "weights", "out", "within"),
    [
        (torch.float32, torch.float32, None, 1e-6),
        (torch.float32, torch.bfloat16, None, 1e-6),
        (torch.float32, torch.bfloat16, torch.bfloat16, 5e-3),
        (torch.bfloat16, torch.bfloat16, None, 5e-3),
    ],
)
def test_output_and_gradient_are_the_exact_ones(
    inputs: torch.dtype, weights: torch.dtype, out: torch.dtype | None, within: float, scale: float
) -> None:
    norm = frozen(weights, out)
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(3, 5, WIDTH, generator=generator)).to(inputs).requires_grad_()
    found = norm(x)
    gradient = torch.randn(found.shape, generator=generator).to(found.dtype)
    found.backward(gradient)
    wanted, wanted_gradient = exact(x, norm.weight, gradient)
    assert found.dtype == (out or torch.result_type(x, norm.weight))
    assert x.grad is not None
    assert x.grad.dtype == inputs
    assert (found - wanted).norm() <= within * wanted.norm()
    assert (x.grad - wanted_gradient).norm() <= within * wanted_gradient.norm()


def test_a_weight_that_is_trained_gets_its_gradient() -> None:
    norm, x = frozen(), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = norm(x)
    norm.weight.requires_grad_()
    out = norm(x)
    torch.testing.assert_close(out, without)
    out.sum().backward()
    torch.testing.assert_close(norm.weight.grad, (without / norm.weight).sum(0).detach())


class GatedRMSNorm(LlamaRMSNorm):
    """One that takes more than its input."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate


class HeadsRMSNorm(LlamaRMSNorm):
    """One with a weight for each head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter(torch.ones(heads, width))


class Layers(nn.Module):
    """Norms of several kinds under the names that layers give them."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": model_type})()
        self.layer = nn.Module()
        self.layer.input_layernorm = LlamaRMSNorm(WIDTH)
        self.layer.q_norm = LlamaRMSNorm(8)
        self.layer.other = GemmaRMSNorm(WIDTH)
        self.layer.mean = nn.LayerNorm(WIDTH)
        self.layer.gated = GatedRMSNorm(WIDTH)
        self.layer.heads = HeadsRMSNorm(2, 8)
        self.requires_grad_(False)


@pytest.mark.parametrize(("model_type", "cast"), [("llama", True), ("llama", False), ("another", True)])
def test_norms_that_compute_the_same_are_replaced_and_no_others(model_type: str, cast: bool) -> None:
    model = Layers(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_frozen_norms(model, cast)
    kinds = {name: type(module) for name, module in model.layer.named_children()}
    assert kinds == {
        "input_layernorm": FrozenRMSNorm,
        "q_norm": FrozenRMSNorm,
        "other": GemmaRMSNorm,  # 1 + weight
        "mean": nn.LayerNorm,
        "gated": GatedRMSNorm,
        "heads": HeadsRMSNorm,
    }
    to_bf16 = cast and model_type == "llama"
    assert model.layer.input_layernorm.dtype == (torch.bfloat16 if to_bf16 else None)
    assert model.layer.q_norm.dtype is None
    assert model.layer.input_layernorm.eps == 1e-6
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def without(model: Any) -> int:
    """Put the norms of transformers back; how many."""
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenRMSNorm):
            norm = LlamaRMSNorm(len(module.weight), module.eps)
            norm.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
            count += 1
    return count


@pytest.mark.parametrize(("architecture", "norms"), [("llama", 5), ("mistral", 5), ("qwen2", 5), ("gpt2", 0)])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_model_is_tuned_as_before(architecture: str, norms: int, precision: str, tmp_path: Path) -> None:
    folder = str(write_tiny_llm(tmp_path / "llm", architecture))
    torch.manual_seed(0)
    ours = Backbone(folder, precision=precision, adapter_rank=2, adapter_dropout=0.0)
    plain = copy.deepcopy(ours)
    assert without(plain) == norms
    embeddings = torch.randn(2, 9, ours.embedding_dim)
    mask, positions = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(), torch.arange(9).expand(2, 9)
    found: list[dict[str, Tensor]] = []
    for backbone in (ours, plain):
        states = backbone.states(embeddings, mask, positions)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    within = 1e-4 if precision == "32" else 0.05
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= within * found[1][name].norm() + 1e-6, name
