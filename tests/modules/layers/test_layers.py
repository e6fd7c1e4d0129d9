import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.layers.cache import VersionCache
from lightning_sfubm.modules.layers.fusion import GatedFusion
from lightning_sfubm.modules.layers.items import ItemTable, id_table
from lightning_sfubm.modules.layers.text_affinity import text_affinities
from lightning_sfubm.modules.layers.whitening import WhiteningExperts


def test_whitening_equals_a_loop_over_experts() -> None:
    layer = WhiteningExperts(6, 4, num_experts=3, dropout=0.0, precision="fp32").eval()
    nn.init.normal_(layer.gate.weight)
    nn.init.normal_(layer.experts.bias)
    x = torch.randn(5, 6)
    shares = torch.softmax(x @ layer.gate.weight[:3].T, 1)
    weights, biases = layer.experts.weight.view(3, 4, 6), layer.experts.bias.view(3, 4)
    expected = sum(shares[:, e : e + 1] * (x @ weights[e].T + biases[e]) for e in range(3))
    torch.testing.assert_close(layer(x), expected)


def test_gate_noise_is_named_and_only_in_training() -> None:
    x = torch.randn(5, 6)
    layer, twin = (WhiteningExperts(6, 4, num_experts=3, dropout=0.0, seed=1).train() for _ in range(2))
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(99)  # the global stream has no part in it
    assert torch.equal(twin(x), first)
    resumed = WhiteningExperts(6, 4, num_experts=3, dropout=0.0, seed=5)
    resumed.load_state_dict(twin.state_dict())
    resumed.seed = 1
    assert torch.equal(resumed.train()(x), second)
    assert torch.equal(layer.eval()(x), layer(x))


def test_one_expert_is_an_affine_map() -> None:
    layer = WhiteningExperts(6, 4, num_experts=1, dropout=0.0, precision="fp32")
    x, y = torch.randn(2, 5, 6)
    torch.testing.assert_close(layer(x) + layer(y), layer(x + y) + layer(torch.zeros(1, 6)))
    with pytest.raises(ConfigError, match="num_experts=0"):
        WhiteningExperts(6, 4, num_experts=0)


def test_fusion_is_convex_and_keeps_equal_views() -> None:
    fusion = GatedFusion(4)
    nn.init.normal_(fusion.gate.weight)
    local, other = torch.randn(2, 7, 4)
    torch.testing.assert_close(fusion(local, local), local)
    fused = fusion(local, other)
    assert (fused >= torch.minimum(local, other) - 1e-6).all()
    assert (fused <= torch.maximum(local, other) + 1e-6).all()
    torch.testing.assert_close(GatedFusion(4)(local, other), (local + other) / 2)
    torch.testing.assert_close(GatedFusion(4, own_share=0.9)(local, other), 0.9 * local + 0.1 * other)


def test_id_table() -> None:
    table = id_table(500, 64, seed=3).weight
    assert torch.equal(table, id_table(500, 64, seed=3).weight)
    assert table[0].abs().max() == 0
    assert 0.95 < table[1:].norm(dim=1).mean() < 1.05


def test_item_table_is_the_sum_of_its_parts() -> None:
    tables = {f: ItemTable(5, 4, f, text_dim=6, precision="fp32").eval() for f in ("id", "text", "id+text")}
    for table in tables.values():
        if table.adaptor is not None:
            table.text[1:] = torch.arange(30.0).view(5, 6)
    torch.testing.assert_close(tables["id+text"](), tables["id"]() + tables["text"]())
    assert tables["text"]()[0].abs().max() == 0
    assert tables["id"].semantic() is None


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "buffer", "fused"])
def test_cache_sees_every_change(change: str) -> None:
    module = nn.BatchNorm1d(3)
    cache, calls = VersionCache(module), []

    def compute() -> torch.Tensor:
        calls.append(module.training)
        return module.weight * 2

    first = cache.get("x", compute)
    assert cache.get("x", compute) is first
    assert calls == [False]
    assert module.training
    assert not first.requires_grad
    if change in ("optimizer", "fused"):
        module.weight.grad = torch.ones(3)
        optimizer = torch.optim.SGD if change == "optimizer" else torch.optim.AdamW
        optimizer([module.weight], lr=0.1, fused=change == "fused").step()
    elif change == "load_state_dict":
        module.load_state_dict(nn.BatchNorm1d(3).state_dict())
    else:
        module.running_mean += 1
    torch.testing.assert_close(cache.get("x", compute), 2 * module.weight.detach())
    assert len(calls) == 2


def test_cached_values_can_train_after_inference_mode() -> None:
    module = nn.Linear(2, 2)
    cache = VersionCache(module)
    with torch.inference_mode():
        cache.get("x", lambda: module.weight + 1)
    head = nn.Linear(2, 2)
    head(cache.get("x", lambda: module.weight + 1)).sum().backward()
    assert head.weight.grad is not None


def test_text_affinities_equal_a_loop() -> None:
    text = F.normalize(torch.randn(31, 8), dim=1)
    text[0] = 0
    history = torch.randint(1, 31, (3, 14))
    history[1, :11] = 0
    history[2] = 0
    candidates = torch.randint(1, 31, (3, 6))
    result = text_affinities(text, history, candidates)
    for row in range(2):
        items = [i for i in history[row].tolist() if i]
        for column, candidate in enumerate(candidates[row].tolist()):
            x = text[candidate]
            mean = F.cosine_similarity(text[items[-5:]].mean(0), x, dim=0)
            expected = torch.stack([mean, text[items[-1]] @ x, (text[items[-10:]] @ x).max()])
            torch.testing.assert_close(result[row, column], expected)
    assert result[2].abs().max() == 0
