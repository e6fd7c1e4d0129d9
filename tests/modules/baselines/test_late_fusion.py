from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sfubm.contracts import RankBatch
from lightning_sfubm.errors import DataError
from lightning_sfubm.methods.base import FUSION_USERS, DomainRun
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.layers.affinity import PRODUCT_SCALE, standardise, with_products
from lightning_sfubm.seeds import torch_generator

CANDIDATES, TRUE = 20, torch.tensor([0.8, 1.5, 0.0])


class Stage1:
    """Three affinities: two carry the preference of the user, the third is noise."""

    hidden_dim = 4
    affinity_names = ("score", "text", "noise")

    def __init__(self, rows: int) -> None:
        generator = torch_generator(0, "fusion")
        self.table = standardise(torch.randn(rows, CANDIDATES, 3, generator=generator))
        chance = (self.table @ TRUE).softmax(1)
        self.target = torch.multinomial(chance, 1, generator=generator).squeeze(1)

    def affinities(self, batch: RankBatch) -> Tensor:
        return 7.0 * self.table[batch["user"]] + 3.0  # raw features have a scale and an offset of their own

    def batches(self, low: int, high: int, size: int = 100) -> list[RankBatch]:
        users = torch.arange(low, high).split(size)
        return [
            {"user": u, "target_index": self.target[u], "candidates": torch.zeros(len(u), CANDIDATES)} for u in users
        ]


def hits(scores: Tensor, target: Tensor) -> float:
    return float((scores.argmax(1) == target).float().mean())


def test_weights_are_those_of_the_planted_preference() -> None:
    """T32: the weights that made the choices are found again, and the fusion beats each of its parts on new users."""
    stage1 = Stage1(4000)
    fusion = LateFusion(stage1)
    assert torch.equal(fusion.weights, torch.tensor([1.0, 0.0, 0.0]))
    weights = fusion.fit(stage1.batches(0, 3000))
    torch.testing.assert_close(weights, TRUE, atol=0.1, rtol=0)  # standard error about .02
    (new,) = stage1.batches(3000, 4000, size=1000)
    parts = [hits(stage1.affinities(new)[..., f], new["target_index"]) for f in range(3)]
    fused = hits(fusion.rank(new), new["target_index"])
    assert fused > max(parts) + 0.05
    assert parts[2] < 0.08
    assert hits(stage1.table[3000:] @ TRUE, new["target_index"]) == pytest.approx(fused, abs=0.02)


def test_the_fit_is_the_maximum() -> None:
    stage1 = Stage1(300)
    for products in (False, True):
        fusion = LateFusion(stage1, penalty=3.0, products=products, product_penalty=9.0)
        weights = fusion.fit(stage1.batches(0, 300)).clone().requires_grad_()
        features = with_products(stage1.table) if products else stage1.table
        loss = torch.nn.functional.cross_entropy(features @ weights, stage1.target, reduction="sum")
        loss = loss + 3 * weights[:3].square().sum() + 9 * weights[3:].square().sum()
        (grad,) = torch.autograd.grad(loss, weights)
        assert grad.abs().max() < 0.3  # of a sum over 300 samples


def test_what_cannot_be_fitted_is_named() -> None:
    stage1 = Stage1(4)
    with pytest.raises(DataError, match="no samples to choose its weights from"):
        LateFusion(stage1).fit([])
    assert sum(p.numel() for p in LateFusion(stage1).parameters()) == 0


class Elsewhere(torch.nn.Module):
    """A stage 1 left on another device (one without values: it needs no hardware), which notes where it is asked."""

    hidden_dim = 4
    affinity_names = ("score", "text", "noise")

    def __init__(self, stage1: Stage1) -> None:
        super().__init__()
        self.data = stage1
        self.register_buffer("place", torch.zeros(1, device="meta"))
        self.asked: list[str] = []

    def to(self, device: Any) -> "Elsewhere":  # type: ignore[override]
        self.place = torch.zeros(1, device=device)
        return self

    def affinities(self, batch: RankBatch) -> Tensor:
        assert {x.device for x in batch.values()} == {self.place.device}  # type: ignore[attr-defined]
        self.asked.append(self.place.device.type)
        return self.data.affinities(batch)


def test_stage1_follows_to_the_device_of_the_fusion() -> None:
    """On an accelerator the federated client's module stays where it was evaluated, while held-out samples are on the CPU."""
    stage1 = Elsewhere(Stage1(300))
    fusion = LateFusion(stage1)
    fusion.fit(stage1.data.batches(0, 300))
    assert stage1.asked == ["cpu"] * 3
    fusion.rank(stage1.data.batches(0, 100)[0])
    assert stage1.asked[-1] == "cpu"
    fusion.weights = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match=r"meta|device"):  # the stand-in's affinities are on the CPU
        fusion.rank(stage1.data.batches(0, 100)[0])
    assert stage1.place.device.type == "meta"


def test_stage1_is_asked_in_evaluation_mode() -> None:
    """A module fresh from its training would rank with dropout on."""

    class Dropping(torch.nn.Module):
        hidden_dim, affinity_names = 4, ("score", "text", "noise")

        def __init__(self, stage1: Stage1) -> None:
            super().__init__()
            self.table, self.dropout = stage1.table, torch.nn.Dropout(0.5)

        def affinities(self, batch: RankBatch) -> Tensor:
            return self.dropout(self.table[batch["user"]])

    stage1 = Stage1(300)
    fusion = LateFusion(Dropping(stage1))  # type: ignore[arg-type]
    plain = LateFusion(stage1)
    torch.testing.assert_close(fusion.fit(stage1.batches(0, 300)), plain.fit(stage1.batches(0, 300)), atol=1e-3, rtol=0)
    (batch,) = stage1.batches(0, 100)
    assert torch.equal(fusion.rank(batch), fusion.rank(batch))
    assert fusion._stage1[0].training  # type: ignore[attr-defined]


def test_products_find_what_one_feature_says_of_another() -> None:
    """T32: the text counts only where the score is high, which no weighted sum can say."""
    stage1 = Stage1(4000)
    chance = (2.0 * stage1.table[..., 0] * stage1.table[..., 1]).softmax(1)
    stage1.target = torch.multinomial(chance, 1, generator=torch_generator(1, "fusion")).squeeze(1)
    (new,) = stage1.batches(3000, 4000, size=1000)
    found = []
    for products in (False, True):
        fusion = LateFusion(stage1, 0.3, products, 0.3)
        weights = fusion.fit(stage1.batches(0, 3000))
        found.append(hits(fusion.rank(new), new["target_index"]))
    assert fusion.weights.shape == (9,)
    planted = torch.zeros(9)
    planted[4] = 2.0 * PRODUCT_SCALE  # features 0, 1, 2, then 00, 01, 02, 11, 12, 22
    torch.testing.assert_close(weights, planted, atol=0.4, rtol=0)
    assert found[1] > found[0] + 0.2
    assert found[1] == pytest.approx(hits(chance[3000:], new["target_index"]), abs=0.02)


@pytest.mark.parametrize(
    ("name", "splits"),
    [("fusion", ["train2"]), ("count_fusion", ["train2", "val"]), ("product_fusion", ["train2", "val"])],
)
def test_what_chooses_the_weights_of_each_row(name: str, splits: list[str]) -> None:
    """Never test users; validation ones where there are many weights."""
    stage1, asked = Stage1(300), []

    class Data:
        def rank_dataloader(self, split: str, size: int, *, max_users: int) -> list[RankBatch]:
            asked.append(split)
            assert max_users == FUSION_USERS
            return stage1.batches(0, 300) if split == "train2" else stage1.batches(100, 300)

    run = DomainRun.__new__(DomainRun)
    vars(run).update(client=SimpleNamespace(module=stage1, datamodule=Data()), _stage1_with_counts=stage1)
    fusion = getattr(run, name)
    assert asked == splits
    assert len(fusion.weights) == (9 if name == "product_fusion" else 3)
    batches = stage1.batches(0, 300) + (stage1.batches(100, 300) if "val" in splits else [])
    expected = LateFusion(stage1, products=name == "product_fusion").fit(batches)
    torch.testing.assert_close(fusion.weights, expected)
