"""Training by rows: the same gradients, SparseAdam's steps, and nothing but the touched rows moves."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sfubm.contracts import Catalogue, TrainBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.row_adam import RowAdamW
from lightning_sfubm.modules.sequential import SequentialRecommender

LOSSES: list[dict[str, Any]] = [
    {"loss": "sampled", "num_negatives": 6},
    {"loss": "sampled", "num_negatives": 6, "logits": "cosine"},
    {"loss": "bpr_max", "num_negatives": 6},
    {"loss": "bce"},
]


def build(catalogue: Catalogue, **settings: Any) -> SequentialRecommender:
    torch.manual_seed(0)
    module = SequentialRecommender(SASRec(8, num_heads=1, dropout=0.0), **settings)
    module.bind(catalogue)
    return module.train()


@pytest.mark.parametrize("settings", LOSSES)
def test_gradients_are_those_of_the_whole_table(catalogue: Catalogue, train_batch: TrainBatch, settings: dict) -> None:
    found = []
    for updates in ("all", "rows"):
        module = build(catalogue, item_updates=updates, **settings)
        loss = module.training_step(train_batch, 0)
        loss.backward()
        assert module.items.ids is not None
        gradient = module.items.ids.weight.grad
        assert gradient is not None
        assert gradient.is_sparse == (updates == "rows")
        others = {name: p.grad for name, p in module.named_parameters() if "items" not in name}
        found.append((loss, gradient.to_dense() if gradient.is_sparse else gradient, others))
    (loss, gradient, others), (again, by_rows, others_again) = found
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(by_rows, gradient)
    torch.testing.assert_close(others_again, others)


def test_steps_are_those_of_sparse_adam_and_of_adamw() -> None:
    """Rows as SparseAdam moves them; a dense parameter as AdamW does; several groups."""
    generator = torch.Generator().manual_seed(0)
    start, dense = torch.randn(9, 3, generator=generator), torch.randn(4, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    plain, plain_again = (torch.nn.Parameter(dense.clone()) for _ in range(2))
    optimizer = RowAdamW([{"params": [ours]}, {"params": [plain]}], lr=0.1, weight_decay=0.0)
    references = [
        torch.optim.SparseAdam([theirs], lr=0.1),
        torch.optim.AdamW([plain_again], lr=0.1, weight_decay=0.0, fused=True),
    ]
    untouched = torch.ones(9, dtype=torch.bool)
    for _ in range(6):
        rows = torch.randint(0, 7, (5,), generator=generator)  # repeated ones add up
        values = torch.randn(5, 3, generator=generator)
        for parameter in (ours, theirs):
            parameter.grad = torch.sparse_coo_tensor(rows[None], values, (9, 3))
        plain.grad = plain_again.grad = torch.randn(4, generator=generator)
        untouched[rows] = False
        for one in (optimizer, *references):
            one.step()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(plain, plain_again)
    assert torch.equal(ours[untouched], start[untouched])


def test_weight_decay_shrinks_touched_rows_alone() -> None:
    table = torch.nn.Parameter(torch.ones(3, 2))
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.zeros(1, 2), (3, 2))
    RowAdamW([table], lr=0.5, weight_decay=0.2).step()
    torch.testing.assert_close(table.detach(), torch.tensor([[1.0, 1.0], [0.9, 0.9], [1.0, 1.0]]))


def test_it_learns_and_goes_on_from_a_checkpoint(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Any
) -> None:
    """T32 by rows; an interrupted training ends as the uninterrupted one."""

    def module() -> SequentialRecommender:
        L.seed_everything(0, verbose=False)
        encoder = SASRec(16, dropout=0.0)
        return SequentialRecommender(encoder, lr=1e-2, loss="sampled", num_negatives=64, item_updates="rows")

    whole, half = module(), module()
    trainer = make_trainer(max_epochs=12, limit_val_batches=0)
    trainer.fit(whole, synthetic)
    scores = trainer.test(whole, synthetic, verbose=False)[0]
    assert scores["test/hit@1"] > 0.45
    first = make_trainer(max_epochs=5, limit_val_batches=0)
    first.fit(half, synthetic)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    second = make_trainer(max_epochs=12, limit_val_batches=0)
    second.fit(resumed, synthetic, ckpt_path=tmp_path / "half.ckpt")
    for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_one_step_leaves_other_items_alone(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    module = build(catalogue, loss="sampled", num_negatives=2, item_updates="rows")
    optimizer: Any = module.configure_optimizers()
    assert module.items.ids is not None
    before: Tensor = copy.deepcopy(module.items.ids.weight.detach())
    module.training_step(train_batch, 0).backward()
    optimizer.step()
    moved = (module.items.ids.weight.detach() != before).any(1)
    met = torch.zeros(len(before), dtype=torch.bool)
    met[train_batch["history"]] = met[train_batch["targets"]] = True
    met[0] = False
    assert moved[met].all()
    assert int((moved & ~met).sum()) <= 2  # the negatives
    assert not moved[0]


@pytest.mark.parametrize("settings", [{"loss": "full"}, {"loss": "sampled", "features": "id+text"}])
def test_what_touches_every_item_is_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="touch every item"):
        SequentialRecommender(SASRec(8, num_heads=1), item_updates="rows", **settings)


def test_clipping_is_refused(synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer]) -> None:
    module = SequentialRecommender(SASRec(8, num_heads=1), loss="sampled", item_updates="rows")
    with pytest.raises(ConfigError, match="gradient_clip_val"):
        make_trainer(max_epochs=1, gradient_clip_val=1.0).fit(module, synthetic)


def test_several_processes_are_refused() -> None:
    module = SequentialRecommender(SASRec(8, num_heads=1), loss="sampled", item_updates="rows")
    module._trainer = SimpleNamespace(gradient_clip_val=None, world_size=2, precision="32-true")  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="devices to 1"):
        module.on_fit_start()
