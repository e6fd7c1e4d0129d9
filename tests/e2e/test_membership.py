"""Membership inference succeeds on a teacher that remembers its users, and falls to chance as epsilon falls."""

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_sfubm.audit.subjects import sequence_losses, subjects
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.privacy.attacks import Membership, area_limit, membership

EPOCHS = 25


def attacked(epsilon: float | None) -> Membership:
    """Train a teacher on half of the users of sequences without order, so that all there is to learn is who they are."""
    reader = SyntheticReader(0, num_users=600, num_items=96, mean_length=10, order=0.0)
    data = DomainDataModule(
        "alpha",
        reader,
        text_encoder=HashingTextEncoder(dim=64),
        k_core=0,
        train_users=300,
        max_length=16,
        batch_size=64,
    )
    data.setup("fit")
    torch.manual_seed(0)
    encoder = SASRec(hidden_dim=32, num_layers=1, num_heads=2, max_length=16, dropout=0.0)
    module = FKDDistiller(encoder, num_experts=1, lr=0.01, logits_precision="fp32")
    private = [] if epsilon is None else [DifferentialPrivacy(target_epsilon=epsilon, total_epochs=EPOCHS, delta=1e-3)]
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=private,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    who = subjects(data, 1000, seed=1)
    return membership(-sequence_losses(module.teacher, who), who.member)


@pytest.mark.slow
def test_membership_inference_falls_to_chance_as_epsilon_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    found = {epsilon: attacked(epsilon) for epsilon in (None, 8.0, 0.1)}
    assert found[None].auc.low > 0.7
    assert found[None].tpr.low > 0.01
    assert found[8.0].auc.value < found[None].auc.low
    assert found[0.1].auc.low <= 0.5 <= found[0.1].auc.high
    assert found[0.1].tpr.low <= 0.01
    assert found[0.1].auc.low <= area_limit(0.1, 1e-3)
