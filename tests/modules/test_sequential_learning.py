"""T32 for the sequential baselines and the control with text: each learns the planted chain of topics."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_sfubm.contracts import TrainHistories
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.filter_mixer import FilterMixer
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.layers.cooccurrence import cooccurrence_vectors
from lightning_sfubm.modules.sequential import SequentialRecommender

official_gru = partial(GRU4Rec, 16, dropout=0.1, hidden_dropout=0.05, project=False)
original_sasrec = partial(SASRec, 16, num_heads=1, dropout=0.1, activation="relu", count_from="newest")
post_norm = partial(SASRec, 16, dropout=0.1, feedforward_dim=64, norm_first=False)

CASES = {
    "gru4rec_full": (official_gru, {"loss": "full"}),
    "gru4rec_sampled": (official_gru, {"loss": "sampled", "num_negatives": 64, "logq": 0.0}),
    "gru4rec_logq": (official_gru, {"loss": "sampled", "num_negatives": 64, "logq": 1.0}),
    "gru4rec_bpr_max": (official_gru, {"loss": "bpr_max", "num_negatives": 64, "bpreg": 1.0}),
    "gru4rec_bpr_max_linear": (official_gru, {"loss": "bpr_max", "num_negatives": 64, "bpreg": 0.2, "elu_param": 0.0}),
    "sasrec_pre_norm_bce": (original_sasrec, {"loss": "bce"}),
    "sasrec_pre_norm_full": (original_sasrec, {"loss": "full"}),
    "sasrec_post_norm_bce": (post_norm, {"loss": "bce"}),
    "sasrec_post_norm_full": (post_norm, {"loss": "full"}),
    "sasrec_cooccurrence": (post_norm, {"item_init": "cooccurrence"}),
    "id_text_cooccurrence": (post_norm, {"features": "id+text", "item_init": "cooccurrence"}),
    "id_text": (post_norm, {"features": "id+text"}),
}


@pytest.mark.parametrize("name", CASES)
def test_learns_the_planted_chain(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], name: str
) -> None:
    """Chance of Hit@1 is .05; who knows the topic that follows, and nothing else, has about .6."""
    make_encoder, settings = CASES[name]
    L.seed_everything(0, verbose=False)
    encoder: nn.Module = make_encoder()
    module = SequentialRecommender(encoder, lr=1e-2, **settings)
    trainer = make_trainer(max_epochs=12, limit_val_batches=0)
    trainer.fit(module, synthetic)
    scores = trainer.test(module, synthetic, verbose=False)[0]
    assert scores["test/hit@1"] > 0.45
    assert scores["test/full_ndcg@10"] > 0.5


def test_a_run_that_stopped_within_an_epoch_ends_as_if_it_had_not(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """T30 between the ends of epochs: the batches that were left, and no other, are trained on."""

    def trained(folder: str, resume: str | None = None, **flags: int) -> tuple[L.Trainer, SequentialRecommender]:
        L.seed_everything(0, verbose=False)
        module = SequentialRecommender(SASRec(16, dropout=0.0), lr=1e-2)
        keep = ModelCheckpoint(tmp_path / folder, save_top_k=-1, every_n_train_steps=4)
        trainer = make_trainer(
            limit_val_batches=0, enable_checkpointing=True, callbacks=[keep], **{"max_epochs": 2, **flags}
        )
        trainer.fit(module, synthetic, ckpt_path=resume, weights_only=False)
        return trainer, module

    trainer, whole = trained("whole")
    assert trainer.num_training_batches % 4  # a checkpoint lies within the second epoch
    paths = sorted((tmp_path / "whole").iterdir(), key=lambda path: int(path.stem.split("step=")[1]))
    steps = [int(path.stem.split("step=")[1]) for path in paths]
    for step in (steps[0], steps[-1]):  # in either epoch
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*ended before the epoch ended.*")
            again, resumed = trained(f"from {step}", str(paths[steps.index(step)]))
        assert again.global_step == trainer.global_step
        for name, value in whole.state_dict().items():
            assert value.equal(resumed.state_dict()[name]), f"{name}, from step {step}"


def test_items_start_from_their_cooccurrence_once(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """Before the first step the table is the embedding of the co-occurrences; a later fit and a resumed one keep theirs."""

    def module() -> SequentialRecommender:
        L.seed_everything(0, verbose=False)
        return SequentialRecommender(SASRec(16, dropout=0.0), lr=1e-2, item_init="cooccurrence")

    started = module()
    make_trainer(max_epochs=0, limit_val_batches=0).fit(started, synthetic)
    started.trainer.datamodule = synthetic  # type: ignore[attr-defined]
    started.on_fit_start()
    assert synthetic.catalogue.histories is not None
    assert started.items.ids is not None
    expected = cooccurrence_vectors(synthetic.catalogue.histories, synthetic.num_items, 16, 0)
    assert torch.equal(started.items.ids.weight, expected)

    whole, half, resumed = module(), module(), module()
    make_trainer(max_epochs=4, limit_val_batches=0).fit(whole, synthetic)
    first = make_trainer(max_epochs=2, limit_val_batches=0)
    first.fit(half, synthetic)
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(max_epochs=4, limit_val_batches=0).fit(resumed, synthetic, ckpt_path=tmp_path / "half.ckpt")
    for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_histories_longer_than_the_encoder_takes_are_refused_before_training(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer]
) -> None:
    """Those of training are two items shorter than those of `test` and three than those of `predict`."""
    longest = synthetic.longest_history
    assert longest <= synthetic.max_length
    for kind in (SASRec, FilterMixer):
        with pytest.raises(ConfigError, match=rf"max_length={longest - 1} items, and domain .* has some of {longest}"):
            make_trainer(max_epochs=1).fit(SequentialRecommender(kind(8, max_length=longest - 1)), synthetic)
        make_trainer(max_epochs=0).fit(SequentialRecommender(kind(8, max_length=longest)), synthetic)


@pytest.mark.parametrize(("logits", "features", "length"), [("dot", "id", 0.1), ("cosine", "id", 1.0)])
def test_items_that_nobody_took_do_not_start_alike(
    logits: str, features: str, length: float, synthetic: DomainDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of zeros have the same gradients in every step: such items would tie in every ranking, each tie a miss."""
    catalogue = replace(synthetic.catalogue, histories=None)
    module = SequentialRecommender(SASRec(8), logits=logits, features=features, item_init="cooccurrence")  # type: ignore[arg-type]
    module.bind(catalogue)
    assert module.items.ids is not None
    random = module.items.ids.weight.detach().clone()
    taken = TrainHistories(np.array([1, 2, 3, 1, 3]), np.array([0]), np.array([5]))
    monkeypatch.setattr(module, "train_histories", lambda: taken)
    module._start_items()
    table = module.items.ids.weight.detach()
    assert torch.equal(table[4:], length * random[4:])
    assert not torch.isclose(table[1:4], random[1:4]).all(1).any()
    assert not table[0].any()


def test_cooccurrence_needs_learned_vectors_and_sequences(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(ConfigError, match=r"item_init='cooccurrence' with features='text'"):
        SequentialRecommender(SASRec(8), features="text", item_init="cooccurrence")
    with pytest.raises(ConfigError, match="item_init='svd'"):
        SequentialRecommender(SASRec(8), item_init="svd")  # type: ignore[arg-type]
    module = SequentialRecommender(SASRec(8), item_init="cooccurrence")
    module.bind(synthetic.catalogue)
    with pytest.raises(ConfigError, match="training sequences"):
        make_trainer(max_epochs=1, limit_val_batches=0).fit(module, synthetic.train_dataloader())
