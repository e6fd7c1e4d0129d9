"""Attention with a gradient of its own: against exact arithmetic, and only where it is for."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from lightning_sfubm.modules.llm import attention as own
from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.tiny import write_tiny_llm


def inputs(dtype: torch.dtype, heads: int = 6, shared: int = 2, rows: int = 3, length: int = 13) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, heads, length, 8), (rows, shared, length, 8), (rows, shared, length, 5)]
    return [torch.randn(size, generator=generator).mul_(3).to(dtype).requires_grad_() for size in sizes]


def hidden(rows: int = 3, length: int = 13) -> Tensor:
    """Another mask in each row; the first and the last key are hidden from most."""
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
    mask[1, :, 4:, :3] = False
    mask[2, :, :, 6:9] = False
    return mask | torch.eye(length, dtype=torch.bool)


def exact(tensors: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output (B, S, A, D') and gradients in float64, written out."""
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in tensors)
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * query.shape[-1] ** -0.5
    shares = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    out = (shares @ value.repeat_interleave(groups, 1)).transpose(1, 2)
    (out * weights(out)).sum().backward()
    return out.detach(), [tensor.grad for tensor in (query, key, value) if tensor.grad is not None]


def weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)


class Layer(nn.Module):
    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("held", [own.HELD_LOGITS, 1], ids=["all rows", "row by row"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("as_bool", [True, False])
def test_output_and_gradients_are_exact_ones(
    dtype: torch.dtype, within: float, as_bool: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "HELD_LOGITS", held)
    tensors, mask = inputs(dtype), hidden()
    expected, gradients = exact(tensors, mask)
    out, none = own.attention(Layer(), *tensors, mask if as_bool else own.additive(mask, dtype), scaling=8**-0.5)
    (out * weights(out)).sum().backward()
    assert none is None
    assert type(out.grad_fn.next_functions[0][0].next_functions[0][0]).__name__ == "_AttentionBackward"
    for found, wanted in zip([out, *(t.grad for t in tensors)], [expected, *gradients], strict=True):
        assert found is not None
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < within * wanted.norm()


def test_one_mask_for_all_rows() -> None:
    tensors, mask = inputs(torch.float32), hidden()[:1]
    _, gradients = exact(tensors, mask)
    out, _ = own.attention(Layer(), *tensors, mask, scaling=None)
    (out * weights(out)).sum().backward()
    for tensor, wanted in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["no gradient", "no mask", "dropout", "one query", "two dimensions", "learned mask"])
def test_elsewhere_it_is_that_of_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own._Attention, "apply", None)  # would fail if it were called
    tensors, options = inputs(torch.float32), {"dropout": 0.1} if case == "dropout" else {}
    mask = None if case == "no mask" else hidden()
    if case == "one query":
        tensors[0], mask = tensors[0][:, :, -1:], hidden()[:, :, -1:]
    if case == "two dimensions":
        mask = torch.ones(13, 13, dtype=torch.bool).tril()
    if case == "learned mask":
        mask = own.additive(hidden(), torch.float32).clamp_min(-1e4).requires_grad_()
    with torch.set_grad_enabled(case != "no gradient"):
        out, _ = own.attention(Layer(), *tensors, mask, **options)
    if case != "dropout":
        causal = case in ("no mask", "two dimensions")
        wanted, _ = exact(inputs(torch.float32), torch.ones(13, 13).tril().bool() if causal else hidden())
        torch.testing.assert_close(out, wanted[:, -out.shape[1] :].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_model_is_tuned_as_before(architecture: str, precision: str, tmp_path: Path) -> None:
    folder = str(write_tiny_llm(tmp_path / "llm", architecture))
    torch.manual_seed(0)
    ours = Backbone(folder, precision=precision, adapter_rank=2, adapter_dropout=0.0)
    plain = copy.deepcopy(ours)
    plain.causal_lm.set_attn_implementation("sdpa")
    assert ours.causal_lm.config._attn_implementation == own.NAME
    embeddings = torch.randn(2, 9, ours.embedding_dim)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    positions = torch.arange(9).expand(2, 9)
    found: list[dict[str, Any]] = []
    for backbone in (ours, plain):
        states = backbone.states(embeddings, mask, positions)
        (states * weights(states)).sum().backward()
        found.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    within = 1e-3 if precision == "32" else 0.05
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= within * found[1][name].norm() + 1e-6, name


@pytest.mark.parametrize("form", ["bool", "least of float32"])
def test_a_query_that_sees_nothing_spoils_no_gradient(form: str) -> None:
    mask = hidden()
    mask[0, 0, :3] = False  # as a left-padded row has it
    found = []
    for attend in (own.attention, own._plain):
        tensors = inputs(torch.float32)
        given = mask if form == "bool" else own.additive(mask, torch.float32).clamp_min(torch.finfo(torch.float32).min)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = attend(Layer(), *tensors, given)
        out[:, 3:].float().square().sum().backward()
        found.append([tensor.grad for tensor in tensors])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.isfinite(ours).all()
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_gradient_is_the_same_within_autocast() -> None:
    found = []
    for inside in (True, False):
        tensors = inputs(torch.bfloat16)
        out, _ = own.attention(Layer(), *tensors, hidden())
        loss = (out * weights(out)).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
        found.append([tensor.grad for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_that_asks_for_the_name_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own.inspect, "getsource", lambda module: 'if config._attn_implementation in ("eager", "sdpa"):')
    model = MagicMock()
    own.use_own_gradient(model)
    model.set_attn_implementation.assert_not_called()


def test_a_model_is_read_in_another_process(tmp_path: Path) -> None:
    backbone = Backbone(str(write_tiny_llm(tmp_path / "llm")), precision="32")
    torch.save(backbone, tmp_path / "backbone.pt")
    states = "b.states(torch.ones(1, 3, b.embedding_dim), torch.ones(1, 3).bool(), torch.arange(3)[None])"
    program = f"import sys, torch; b = torch.load(sys.argv[1], weights_only=False); print({states}.shape[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "backbone.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["3"], done.stderr[-2000:]
