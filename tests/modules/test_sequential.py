import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, PredictBatch, RankBatch, TrainBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.evaluation.metrics import catalogue_ranks
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES
from lightning_sfubm.modules.sequential import SequentialRecommender

VARIANTS = [
    {},
    {"logits": "cosine"},
    {"features": "text", "logits": "cosine"},
    {"features": "id+text", "num_experts": 2},
    {"loss": "sampled", "num_negatives": 10},
    {"loss": "sampled", "num_negatives": 10, "logq": 0.0},
    {"loss": "bpr_max", "num_negatives": 10},
    {"loss": "bce"},
    {"input_scale": 8.0},
]


def build(catalogue: Catalogue, encoder: nn.Module | None = None, **kwargs) -> SequentialRecommender:
    torch.manual_seed(0)
    module = SequentialRecommender(encoder or SASRec(8, num_heads=1), logits_precision="fp32", **kwargs)
    module.bind(catalogue)
    return module.eval()


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_training_step_moves_all_parameters(catalogue: Catalogue, train_batch: TrainBatch, kwargs: dict) -> None:
    module = build(catalogue, **kwargs).train()
    loss = module.training_step(train_batch, 0)
    assert loss.isfinite()
    loss.backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_negatives_are_drawn_by_the_counts_of_the_catalogue_bound_last(
    catalogue: Catalogue, train_batch: TrainBatch
) -> None:
    settings = {"loss": "sampled", "num_negatives": 10, "negative_power": 1.0}
    counts = torch.zeros(catalogue.num_items + 1)
    counts[3] = 1000
    other = dataclasses.replace(catalogue, train_counts=counts)
    module = build(catalogue, **settings)
    before = module.training_step(train_batch, 0)
    module.bind(other)
    after = module.training_step(train_batch, 0)
    assert not torch.isclose(before, after)
    torch.testing.assert_close(after, build(other, **settings).training_step(train_batch, 0))


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_candidates_permuted_scores_permuted(catalogue: Catalogue, rank_batch: RankBatch, kwargs: dict) -> None:
    """T13, and rank == score_all at the candidates."""
    module = build(catalogue, **kwargs)
    assert isinstance(module, CatalogueRanker)
    order = torch.randperm(10)
    shuffled = copy.copy(rank_batch)
    shuffled["candidates"] = rank_batch["candidates"][:, order]
    torch.testing.assert_close(module.rank(shuffled), module.rank(rank_batch)[:, order])
    everything = module.score_all(rank_batch)
    assert everything.shape == (5, 31)
    torch.testing.assert_close(module.rank(rank_batch), everything.gather(1, rank_batch["candidates"]))


def test_what_a_user_has_had_before_the_history_is_neither_ranked_nor_recommended(
    catalogue: Catalogue, rank_batch: RankBatch
) -> None:
    module = build(catalogue)
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    scores = module.score_all(rank_batch)
    best = scores[:, 1:].topk(4).indices + 1
    batch = copy.copy(rank_batch)
    batch["seen"] = torch.cat([best, rank_batch["history"]], 1)
    module.validation_step(batch, 0)
    found = module.catalogue_metrics["val"].compute()["val/full_mrr"]
    expected = [catalogue_ranks(scores, batch["target"], seen) for seen in (batch["seen"], batch["history"])]
    torch.testing.assert_close(found, expected[0].reciprocal().mean())
    assert not torch.equal(*expected)
    answers = module.predict_step(PredictBatch(history=batch["history"], user=batch["user"], seen=batch["seen"]), 0)
    for row, items in enumerate(answers["items"].tolist()):
        allowed = set(range(1, catalogue.num_items + 1)) - set(batch["seen"][row].tolist())
        assert items == sorted(allowed, key=lambda item, row=row: -scores[row, item])[:10]  # type: ignore[misc]


def test_the_learning_rate_rises_by_equal_steps_from_the_first(catalogue: Catalogue) -> None:
    made: Any = build(catalogue, lr=0.1, warmup_steps=4).configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert made["lr_scheduler"]["interval"] == "step"


def test_input_scale_leaves_states_and_makes_logits_small(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    plain, scaled = build(catalogue), build(catalogue, input_scale=8.0)
    torch.testing.assert_close(scaled.items.ids.weight, plain.items.ids.weight / 8)
    torch.testing.assert_close(scaled.user_states(rank_batch), plain.user_states(rank_batch))
    torch.testing.assert_close(scaled.score_all(rank_batch), plain.score_all(rank_batch) / 8)
    refused = [{"input_scale": value} for value in (0.0, -1.0, float("nan"), float("inf"))]
    for settings in (*refused, {"input_scale": 8.0, "features": "id+text"}):
        with pytest.raises(ConfigError, match="input_scale"):
            build(catalogue, **settings)


@pytest.mark.parametrize("encoder", [SASRec(8, num_heads=1), GRU4Rec(8)], ids=["sasrec", "gru4rec"])
def test_left_padding_changes_nothing(catalogue: Catalogue, rank_batch: RankBatch, encoder: nn.Module) -> None:
    module = build(catalogue, encoder, features="id+text")
    longer = copy.copy(rank_batch)
    longer["history"] = torch.cat([torch.zeros(5, 4, dtype=torch.int64), rank_batch["history"]], 1)
    for output in (module.rank, module.user_states, module.score_all, module.affinities):
        torch.testing.assert_close(output(longer), output(rank_batch))


def test_stage1_contract(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    module = build(catalogue, features="id+text", logits="cosine")
    assert module.affinity_names == ("score", *TEXT_AFFINITIES)
    affinities = module.affinities(rank_batch)
    assert affinities.shape == (5, 10, 4)
    torch.testing.assert_close(affinities[..., 0], module.rank(rank_batch))
    ids, semantic = module.item_tables()
    assert ids.shape == semantic.shape == (31, 8)
    assert module.user_states(rank_batch).shape == (5, 8)
    plain = build(catalogue)
    assert plain.affinities(rank_batch).shape == (5, 10, len(plain.affinity_names))
    assert plain.item_tables()[1].abs().max() == 0


class Power(SASRec):
    """A plug-in that hands arguments on, and keeps one of its own under the name given, another one or that of a module."""

    def __init__(self, power: float = 2.0, kept_as: str = "power", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kept_as = kept_as
        setattr(self, kept_as.removesuffix(" module"), nn.Dropout(power / 10) if "module" in kept_as else power)

    def forward(self, item_embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = super().forward(item_embeddings, mask)
        power = getattr(self, self.kept_as.removesuffix(" module"))
        return states.sign() * states.abs() ** (power if isinstance(power, float) else 2.0)


@pytest.mark.parametrize("model", [SequentialRecommender, FKDDistiller])
def test_an_encoder_that_would_be_rebuilt_from_defaults_is_refused(model: type[L.LightningModule]) -> None:
    for kept_as in ("_power", "power module"):
        with pytest.raises(ConfigError, match="Power does not keep the value of its constructor argument 'power'"):
            model(Power(3.0, kept_as, hidden_dim=8))


def test_a_plug_in_is_rebuilt_with_what_it_was_given(
    catalogue: Catalogue, rank_batch: RankBatch, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """Arguments that it hands on to a base class included."""
    torch.manual_seed(0)
    module = SequentialRecommender(Power(3.0, hidden_dim=8, num_heads=1, num_layers=1)).eval()
    module.bind(catalogue)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "plug.ckpt", weights_only=True)
    again = SequentialRecommender.load_from_checkpoint(tmp_path / "plug.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again.rank(rank_batch), module.rank(rank_batch))


def test_test_items_leave_no_trace_in_training(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    """T15: the loss of a position does not depend on later items of the row."""
    module = build(catalogue)
    early = copy.deepcopy(train_batch)
    early["targets"][:, 4:] = 0
    changed = copy.deepcopy(early)
    changed["history"][:, 5:] = changed["history"][:, 5:].flip(0).clamp_min(1)
    torch.testing.assert_close(module.training_step(early, 0), module.training_step(changed, 0))


def test_wrong_settings_are_named(catalogue: Catalogue) -> None:
    for kwargs, message in (
        ({"features": "image"}, "features='image'"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"logq": 1.5}, r"logq=1.5 must lie in \[0, 1\]"),
        ({"loss": "bpr_max", "bpreg": -1.0}, "bpreg=-1.0"),
        ({"loss": "bpr_max", "elu_param": -0.5}, "elu_param=-0.5"),
        ({"text_dropout": 2}, r"SequentialRecommender: text_dropout=2 must lie in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            SequentialRecommender(SASRec(8), **kwargs)
    with pytest.raises(ConfigError, match="Linear is no encoder"):
        SequentialRecommender(nn.Linear(2, 2))
    textless = Catalogue("t", 3, ["", "a", "b", "c"], None, torch.ones(4))
    with pytest.raises(ConfigError, match="needs text vectors"):
        SequentialRecommender(SASRec(8), features="text").bind(textless)
    module = build(catalogue)
    with pytest.raises(ConfigError, match="bound to 30 items with text dimension 12, but domain 't' has 3 and 0"):
        module.bind(textless)


def test_defaults_are_the_documented_ones() -> None:
    """T20 for the module: what a config leaves out is what the constructor says."""
    module = SequentialRecommender(SASRec())
    assert (module.features, module.logits, module.loss, module.logits_precision) == ("id", "dot", "full", "auto")
    assert (module.hidden_dim, module.encoder.num_layers, module.encoder.max_length) == (64, 2, 50)
    assert module.lr == 3e-3


def test_training_on_samples_of_stage_2_is_refused_in_a_sentence(
    catalogue: Catalogue, rank_batch: RankBatch, make_trainer: Callable[..., L.Trainer]
) -> None:
    samples = torch.utils.data.DataLoader([rank_batch], batch_size=None)  # type: ignore[arg-type, var-annotated]
    with pytest.raises(ConfigError, match=r"SequentialRecommender is trained on sequences, .* use .*DomainDataModule"):
        make_trainer(max_epochs=1).fit(build(catalogue), samples)


@pytest.mark.parametrize("limit", [1.0, 3])
def test_training_terms_are_the_means_over_an_epochs_rows(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """They are given to the trainer once, with the last batch; a short last batch counts by its rows, no epoch twice."""
    module, seen = SequentialRecommender(SASRec(8, num_heads=1)), []
    log = module.log_losses
    monkeypatch.setattr(module, "log_losses", lambda batch, loss: (seen.append((loss, batch)), log(batch, loss=loss)))
    trainer = make_trainer(max_epochs=2, limit_train_batches=limit, limit_val_batches=0)
    trainer.fit(module, synthetic)
    last = seen[len(seen) // 2 :]
    rows = torch.tensor([float(len(batch["user"])) for _, batch in last])
    expected = (torch.stack([loss.detach() for loss, _ in last]) * rows).sum() / rows.sum()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected)


@pytest.mark.parametrize("encoder", [SASRec(16, dropout=0.1), GRU4Rec(16, dropout=0.1)], ids=["sasrec", "gru4rec"])
def test_learns_and_reloads(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path, encoder: nn.Module
) -> None:
    """T32, T12 and reload parity: far over chance (.05) in seconds, equal after a reload without a datamodule."""
    L.seed_everything(0, verbose=False)
    module = SequentialRecommender(copy.deepcopy(encoder), lr=1e-2)
    trainer = make_trainer(max_epochs=12)
    trainer.fit(module, synthetic)
    assert {"val/hit@1", "val/ndcg@10", "val/mrr", "val/full_hit@10", "val/full_ndcg@10", "train/loss"} <= set(
        trainer.callback_metrics
    )
    scores = trainer.test(module, synthetic, verbose=False)[0]
    assert scores["test/hit@1"] > 0.3
    assert scores["test/full_ndcg@10"] > 0.2

    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["encoder"]["class_path"].endswith(type(encoder).__name__)
    again = SequentialRecommender.load_from_checkpoint(path, weights_only=True)
    assert type(again.encoder) is type(encoder)
    batch = next(iter(synthetic.test_dataloader()))
    torch.testing.assert_close(again.eval().score_all(batch), module.eval().score_all(batch), rtol=0, atol=0)
    rescored = make_trainer().test(again, synthetic, verbose=False)[0]
    assert rescored == scores


def test_checkpoint_of_another_model_is_refused(
    catalogue: Catalogue, make_trainer: Callable[..., L.Trainer], tmp_path
) -> None:
    module = build(catalogue)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    content = torch.load(path, weights_only=True)

    other = SequentialRecommender(SASRec(8, num_heads=1))
    other.bind(Catalogue("t", 3, ["", "a", "b", "c"], None, torch.ones(4)))
    with pytest.raises(CheckpointError, match="num_items=30, this SequentialRecommender has 3"):
        other.on_load_checkpoint(content)
    with pytest.raises(CheckpointError, match="The state lacks 'encoder"):
        SequentialRecommender(GRU4Rec(8)).on_load_checkpoint(content)
    with pytest.raises(CheckpointError, match=r"'encoder.positions.weight' has shape \(50, 8\), expected \(20, 8\)"):
        SequentialRecommender(SASRec(8, num_heads=1, max_length=20)).on_load_checkpoint(content)
    del content["stage1_shapes"]
    with pytest.raises(CheckpointError, match="no stage-1 module"):
        SequentialRecommender(SASRec(8)).on_load_checkpoint(content)
