"""UniSRec: its losses against loops, what each mode trains, and transfer on planted data."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, RankBatch, TrainBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.datamodules.union_datamodule import UnionDataModule
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.baselines.unisrec import UniSRec
from lightning_sfubm.modules.baselines.unisrec_pretraining import (
    UniSRecPretraining,
    sequence_item_loss,
    sequence_sequence_loss,
    without_items,
)
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES
from lightning_sfubm.seeds import torch_generator
from lightning_sfubm.training import fit_to_early_stopping

SMALL: dict[str, Any] = {"num_experts": 2, "logits_precision": "fp32"}


def build(cls: type, catalogue: Catalogue, **kwargs) -> Any:
    torch.manual_seed(0)
    module = cls(SASRec(8, num_layers=1, num_heads=1), **{**SMALL, **kwargs})
    module.bind(catalogue)
    return module


def pretrained(catalogue: Catalogue) -> UniSRecPretraining:
    torch.manual_seed(1)
    module = UniSRecPretraining(SASRec(8, num_layers=1, num_heads=1), seed=1, **SMALL)
    module.bind(catalogue)
    return module


def moved(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_unit_rows_of_text_alone_are_made_once_per_change(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    """A large catalogue is ranked for a few users at a time; what does not depend on them is not to be made for each."""
    for module, branch in ((build(UniSRec, catalogue), ""), (build(FKDDistiller, catalogue), "teacher")):
        module.eval()
        first, again = (module.logit_inputs(rank_batch["history"], branch)[1] for _ in range(2))
        assert first is again
        torch.testing.assert_close(first[1:].norm(dim=1), torch.ones(len(first) - 1))
        with torch.no_grad():
            next(p for name, p in module.named_parameters() if "experts.weight" in name).mul_(-1.5)
        states, items = module.logit_inputs(rank_batch["history"], branch)
        assert not torch.allclose(items, first)
        table = module.teacher.table() if branch else module.items()
        torch.testing.assert_close(items, F.normalize(table.detach(), dim=1))
        torch.testing.assert_close(states.norm(dim=1), torch.full((len(states),), 1 / 0.07))


# ------------------------------------------------------------------ losses


def test_sequence_item_loss_is_the_loop_over_instances() -> None:
    """Repeated next items count as often as they occur, other states with the own next item never."""
    generator = torch_generator(0, "losses")
    states, table = torch.randn(7, 4, generator=generator), torch.randn(6, 4, generator=generator)
    targets = torch.tensor([1, 3, 3, 5, 1, 3, 2])
    queries, items = F.normalize(states, dim=1), F.normalize(table, dim=1)
    expected = []
    for row, target in enumerate(targets):
        logits = [queries[row] @ items[target] / 0.07]
        logits += [queries[row] @ items[other] / 0.07 for other in targets if other != target]
        expected.append(torch.stack(logits).logsumexp(0) - logits[0])
    torch.testing.assert_close(sequence_item_loss(states, table, targets, 0.07), torch.stack(expected).mean())
    assert sequence_item_loss(states[:0], table, targets[:0], 0.07) == 0


def test_sequence_sequence_loss_is_the_loop_over_instances() -> None:
    generator = torch_generator(0, "losses")
    states, copies = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    targets = torch.tensor([1, 2, 1, 3, 4])
    queries, keys = F.normalize(states, dim=1), F.normalize(copies, dim=1)
    expected = []
    for row in range(5):
        logits = [queries[row] @ keys[row] / 0.1]
        logits += [queries[row] @ keys[other] / 0.1 for other in range(5) if targets[other] != targets[row]]
        expected.append(torch.stack(logits).logsumexp(0) - logits[0])
    torch.testing.assert_close(sequence_sequence_loss(states, copies, targets, 0.1), torch.stack(expected).mean())
    assert sequence_sequence_loss(states[:1], copies[:1], targets[:1], 0.1) == 0


def test_items_left_out_close_the_gap() -> None:
    history = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 9]])
    dropped = torch.tensor([[True, False, True, False, True], [True, True, False, True, False]])
    order, kept = without_items(history, dropped)
    assert kept.tolist() == [[0, 0, 0, 5, 6], [0, 0, 1, 3, 9]]  # the oldest item of a row stays
    assert torch.equal(history.gather(1, order)[kept > 0], kept[kept > 0])
    everything = without_items(history, torch.ones_like(dropped))[1]
    assert everything.tolist() == [[0, 0, 0, 0, 5], [0, 0, 0, 0, 1]]


# ------------------------------------------------------------------ pre-training


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["items", "words"])
def test_pretraining_step(catalogue: Catalogue, train_batch: TrainBatch, share: float) -> None:
    """All parameters move; the terms add up; what is dropped differs by step and repeats with the seed."""
    module = build(UniSRecPretraining, catalogue, item_drop_share=share, seq_seq_weight=0.5, text_dropout=0.0)
    module.masked_text = catalogue.text_embeddings.roll(1, 1)
    module.train()
    module.training_step(train_batch, 0).backward()
    assert moved(module) == {name for name, _ in module.named_parameters()}

    module.eval()
    logged: dict[str, torch.Tensor] = {}
    module.log_losses = lambda batch, **terms: logged.update(terms)
    loss = module.training_step(train_batch, 0)
    torch.testing.assert_close(loss, logged["seq_item"] + 0.5 * logged["seq_seq"])
    torch.testing.assert_close(module.training_step(train_batch, 0), loss)
    table, predicting = module.items.frozen(), train_batch["targets"] != 0
    states = module.encoder(table[train_batch["history"]], train_batch["history"] != 0)[predicting]
    whole = sequence_item_loss(states, table, train_batch["targets"][predicting], module.tau)
    torch.testing.assert_close(logged["seq_item"], whole)
    module.seed = 5
    assert module.training_step(train_batch, 0) != loss


def test_without_dropping_the_copy_is_the_sequence(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    module = build(UniSRecPretraining, catalogue, drop_ratio=0.0).eval()
    history = train_batch["history"]
    ids, places = torch.unique(history, return_inverse=True)
    table = module.items.frozen()[ids]
    whole = module.encoder(F.embedding(places, table), history != 0)
    copied = module._augmented_states(history, places, ids, table)
    torch.testing.assert_close(copied[:, -1], whole[:, -1])
    plain = build(UniSRecPretraining, catalogue, seq_seq_weight=0.0).eval()
    terms: dict[str, torch.Tensor] = {}
    plain.log_losses = lambda batch, **given: terms.update(given)
    plain.training_step(train_batch, 0)
    assert set(terms) == {"loss", "seq_item"}


def test_no_future_in_the_loss_of_a_position(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    """T15: what is lost at early positions does not depend on later items of the row."""
    module = build(UniSRecPretraining, catalogue, seq_seq_weight=0.0).eval()
    early = copy.deepcopy(train_batch)
    early["targets"][:, 4:] = 0
    changed = copy.deepcopy(early)
    changed["history"][:, 5:] = changed["history"][:, 5:].flip(0).clamp_min(1)
    torch.testing.assert_close(module.training_step(early, 0), module.training_step(changed, 0))


# ------------------------------------------------------------------ modes


@pytest.mark.parametrize(
    ("mode", "freeze", "parts"),
    [
        ("inductive", True, {"items.adaptor"}),
        ("transductive", True, {"items.adaptor", "items.ids"}),
        ("inductive", False, {"items.adaptor", "encoder"}),
    ],
)
def test_fine_tuning_reaches_what_the_mode_trains(
    catalogue: Catalogue, train_batch: TrainBatch, mode: str, freeze: bool, parts: set[str]
) -> None:
    module = build(UniSRec, catalogue, mode=mode, freeze_encoder=freeze).train()
    module.load_pretrained(pretrained(catalogue).shared_state())
    module.training_step(train_batch, 0).backward()
    expected = {name for name, _ in module.named_parameters() if name.startswith(tuple(parts))}
    assert moved(module) == expected
    optimised = {id(parameter) for parameter in module.trained_parameters()}
    assert optimised == {id(p) for name, p in module.named_parameters() if name in expected}


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_from_scratch_everything_is_trained(catalogue: Catalogue, train_batch: TrainBatch, mode: str) -> None:
    module = build(UniSRec, catalogue, mode=mode).train()
    module.training_step(train_batch, 0).backward()
    assert moved(module) == {name for name, _ in module.named_parameters()}


def test_what_is_loaded_is_what_was_trained(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    source = pretrained(catalogue).eval()
    module = build(UniSRec, catalogue).eval()
    before = module.rank(rank_batch)
    module.load_pretrained(source.shared_state())
    assert not torch.allclose(module.rank(rank_batch), before)
    torch.testing.assert_close(module.rank(rank_batch), source.rank(rank_batch))
    beside = build(UniSRec, catalogue, mode="transductive", id_scale=0.0).eval()
    beside.load_pretrained(source.shared_state())
    torch.testing.assert_close(beside.rank(rank_batch), source.rank(rank_batch))
    assert {name.split(".")[0] for name in source.shared_state()} == {"adaptor", "encoder"}
    assert all(catalogue.num_items + 1 not in value.shape for value in source.shared_state().values())


def test_states_that_do_not_fit_are_refused(catalogue: Catalogue) -> None:
    state = pretrained(catalogue).shared_state()
    with pytest.raises(ConfigError, match=r"call bind\(catalogue\) before"):
        UniSRec(SASRec(8, num_heads=1)).load_pretrained(state)
    module = build(UniSRec, catalogue)
    with pytest.raises(CheckpointError, match=r"lacks 'adaptor.gate.weight'"):
        module.load_pretrained({name: value for name, value in state.items() if name != "adaptor.gate.weight"})
    with pytest.raises(CheckpointError, match=r"'adaptor.experts.weight' has shape \(16, 12\), expected \(24, 12\)"):
        build(UniSRec, catalogue, num_experts=3).load_pretrained(state)
    with pytest.raises(CheckpointError, match="not finite"):
        module.load_pretrained({name: value / 0 for name, value in state.items()})
    assert not module.is_pretrained


def test_wrong_settings_are_named(catalogue: Catalogue) -> None:
    for cls, kwargs, message in (
        (UniSRec, {"mode": "both"}, "mode='both'"),
        (UniSRec, {"id_scale": -1.0}, "id_scale=-1.0"),
        (UniSRec, {"tau": 0.0}, "tau=0.0"),
        (UniSRec, {"text_dropout": 2.0}, "UniSRec: text_dropout=2.0 must lie in"),
        (UniSRecPretraining, {"seq_seq_weight": -1.0}, "seq_seq_weight=-1.0"),
        (UniSRecPretraining, {"drop_ratio": 1.0}, "drop_ratio=1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            cls(**kwargs)
    with pytest.raises(ConfigError, match="needs text vectors"):
        UniSRec().bind(Catalogue("t", 3, ["", "a", "b", "c"], None, torch.ones(4)))


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_ranking_contract(catalogue: Catalogue, rank_batch: RankBatch, mode: str) -> None:
    """T13, T14: permuted candidates, left padding, and the columns stage 2 and late fusion read."""
    module = build(UniSRec, catalogue, mode=mode).eval()
    assert isinstance(module, CatalogueRanker)
    order = torch.randperm(10)
    shuffled = copy.copy(rank_batch)
    shuffled["candidates"] = rank_batch["candidates"][:, order]
    torch.testing.assert_close(module.rank(shuffled), module.rank(rank_batch)[:, order])
    torch.testing.assert_close(
        module.score_all(rank_batch).gather(1, rank_batch["candidates"]), module.rank(rank_batch)
    )
    assert module.rank(rank_batch).abs().max() <= 1 / 0.07 + 1e-3
    longer = copy.copy(rank_batch)
    longer["history"] = F.pad(rank_batch["history"], (4, 0))
    torch.testing.assert_close(module.affinities(longer), module.affinities(rank_batch))
    assert module.affinity_names == ("score", *TEXT_AFFINITIES)
    torch.testing.assert_close(module.affinities(rank_batch)[..., 0], module.rank(rank_batch))


def test_inductive_ranks_items_by_text_alone(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    """An item that takes over another's text takes over its scores: what lets new items in without training."""
    text = catalogue.text_embeddings.clone()
    text[7] = text[3]
    twins = Catalogue("twins", catalogue.num_items, catalogue.titles, text, catalogue.train_counts)
    by_text = build(UniSRec, twins).eval().score_all(rank_batch)
    torch.testing.assert_close(by_text[:, 7], by_text[:, 3])
    by_both = build(UniSRec, twins, mode="transductive").eval().score_all(rank_batch)
    assert not torch.allclose(by_both[:, 7], by_both[:, 3])


# ------------------------------------------------------------------ learning


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UnionDataModule:
    """Two domains that share topics, their order and their words; one has ten times the users of the other."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    text = HashingTextEncoder(dim=64)
    data = {
        name: DomainDataModule(
            name,
            SyntheticReader(index, num_users=users, num_items=96, order=0.9),
            text_encoder=text,
            k_core=0,
            max_length=20,
            batch_size=32,
        )
        for name, index, users in (("rich", 0, 500), ("scarce", 1, 50))
    }
    return UnionDataModule(data, batch_size=32)


def make(cls: type, encoder: torch.nn.Module | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    encoder = encoder or SASRec(32, num_layers=1, num_heads=2, max_length=20, dropout=0.1)
    return cls(encoder, **{"num_experts": 2, "text_dropout": 0.0, "lr": 5e-3, **settings})


@pytest.mark.slow
def test_pretrained_on_the_union_beats_scratch(
    planted: UnionDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """T32: what the rich domain shows about the order of topics carries over to the scarce one."""
    L.seed_everything(0, verbose=False)
    pretraining = make(UniSRecPretraining)

    def trainer(label: str, folder: Path, **settings: Any) -> L.Trainer:
        return make_trainer(**{**settings, "enable_checkpointing": True})

    best, used = fit_to_early_stopping(
        trainer, pretraining, planted, label="", folder=tmp_path / "fit", max_epochs=8, patience=3
    )
    assert {"train/seq_item", "train/seq_seq", "val/full_ndcg@10"} <= set(used.callback_metrics)
    assert best > 0.5  # NDCG@10 of a random order of 20 is .227
    scarce = planted.domains["scarce"]
    alone = make(UniSRecPretraining)
    same_steps = make_trainer(max_steps=used.global_step, max_epochs=-1, limit_val_batches=0)
    same_steps.fit(alone, UnionDataModule({"scarce": scarce}, batch_size=32))

    def tuned(mode: str, epochs: int, source: UniSRecPretraining | None) -> float:
        module = make(UniSRec, mode=mode)
        module.bind(scarce.catalogue)
        if source is not None:
            module.load_pretrained(source.shared_state())
        if epochs:
            make_trainer(max_epochs=epochs, limit_val_batches=0).fit(module, scarce)
        return make_trainer().test(module, scarce, verbose=False)[0]["test/ndcg@10"]

    zero_shot = tuned("inductive", 0, pretraining)
    for mode in ("inductive", "transductive"):
        scratch, longer = tuned(mode, 3, None), tuned(mode, 40, None)
        after_three, after_ten = tuned(mode, 3, pretraining), tuned(mode, 10, pretraining)
        assert zero_shot > scratch + 0.1
        assert after_three > scratch + 0.2, mode
        assert after_ten > longer + 0.02, mode
        # Pre-training itself is not what helps, the other domain is.
        assert after_ten > tuned(mode, 10, alone) + 0.02, mode


@pytest.mark.parametrize("encoder", [None, GRU4Rec(32)], ids=["sasrec", "gru4rec"])
def test_scratch_learns_and_reloads(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Path, encoder: torch.nn.Module | None
) -> None:
    """T3, T12, T32: far over chance (.05) from text alone; the checkpoint rebuilds the module and its frozen parts."""
    L.seed_everything(0, verbose=False)
    module = make(UniSRec, copy.deepcopy(encoder), mode="transductive", lr=1e-2)
    trainer = make_trainer(max_epochs=8)
    trainer.fit(module, synthetic)
    scores = trainer.test(module, synthetic, verbose=False)[0]
    assert scores["test/hit@1"] > 0.3
    other = make(UniSRecPretraining, copy.deepcopy(encoder))
    other.bind(synthetic.catalogue)
    module.load_pretrained(other.shared_state())

    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["encoder"]["class_path"].endswith(type(module.encoder).__name__)
    again = UniSRec.load_from_checkpoint(path, weights_only=True)
    assert (again.mode, again.is_pretrained, type(again.encoder)) == ("transductive", True, type(module.encoder))
    assert not any(parameter.requires_grad for parameter in again.encoder.parameters())
    batch = next(iter(synthetic.test_dataloader()))
    torch.testing.assert_close(again.eval().score_all(batch), module.eval().score_all(batch), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="is of UniSRec, not of UniSRecPretraining"):
        UniSRecPretraining().on_load_checkpoint(content)


def test_pretraining_goes_on_after_a_reload(
    planted: UnionDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """The checkpoint is small (no second text table), loads safely, and trains on as the original does."""
    module = make(UniSRecPretraining)
    trainer = make_trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1)
    trainer.fit(module, planted)
    assert torch.equal(module.masked_text, planted.masked_text)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    assert "masked_text" not in torch.load(path, weights_only=True)["state_dict"]
    again = UniSRecPretraining.load_from_checkpoint(path, weights_only=True)
    states = []
    for each in (module, again):
        L.seed_everything(0, verbose=False)
        later = make_trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0)
        later.fit(each, planted, ckpt_path=path, weights_only=True)
        states.append(each.shared_state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
