"""T32 for the sequential baselines and the control with text: each learns the planted chain of topics."""

from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
from torch import nn

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
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
