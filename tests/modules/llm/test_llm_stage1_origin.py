"""A stage 1 that may know what the LLM is tuned on, or is of another domain, is refused on the single-domain route."""

import lightning as L
import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.item_datamodule import ItemDataModule
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated.client import Client
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.stage1 import load_stage1
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.prompt_projector import PromptProjector
from lightning_sfubm.modules.sequential import SequentialRecommender
from tests.conftest import small_distiller


def shop(stage2_positions=1, reader_seed=0, **settings):
    reader = SyntheticReader(reader_seed, num_users=40, num_items=40, mean_length=8)
    data = DomainDataModule(
        "shop",
        reader,
        text_encoder=HashingTextEncoder(8),
        **{"k_core": 0, "num_candidates": 5, "stage2_positions": stage2_positions, **settings},
    )
    data.setup()
    return data


def trainer(steps=1):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, use_distributed_sampler=False, **quiet)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))


def stage1_of(data, path, ckpt_path=None, steps=1):
    module, fitting = SequentialRecommender(SASRec(hidden_dim=8, num_layers=1, num_heads=1)), trainer(steps)
    fitting.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    fitting.save_checkpoint(path)
    return str(path)


def without_positions(path):
    """The file as versions before wrote it."""
    content = torch.load(path, weights_only=True)
    del content["DomainDataModule"]["train_positions"]
    torch.save(content, path)
    return path


def tuned(llm, path, data):
    head = LLMHead(llm, template="movies", stage1_checkpoint=path, precision="32", history_length=4)
    trainer().fit(head, datamodule=RankingDataModule(data, batch_size=2, train_candidates=5))
    return head


def aligned(llm, path, data):
    projector = PromptProjector(llm, stage1_checkpoint=path)
    trainer().fit(projector, datamodule=ItemDataModule(data))
    return projector


@pytest.mark.parametrize("build", [tuned, aligned])
def test_only_a_stage1_of_these_positions_is_taken(llm, tmp_path, build):
    build(llm, stage1_of(shop(), tmp_path / "held.ckpt"), shop())
    with pytest.raises(CheckpointError, match=r"whole.ckpt: .* other positions of domain 'shop'.*stage2_positions 1"):
        build(llm, stage1_of(shop(0), tmp_path / "whole.ckpt"), shop())
    with pytest.raises(CheckpointError, match="other positions"):
        build(llm, stage1_of(shop(stage2_users=5), tmp_path / "some.ckpt"), shop())
    with pytest.raises(CheckpointError, match="trained on other data than domain 'shop'"):
        build(llm, stage1_of(shop(reader_seed=1), tmp_path / "other.ckpt"), shop())


def test_old_files_go_on_but_are_no_stage1(tmp_path):
    """Neither does training on from one, or from other positions, make it a stage 1 of these."""
    data = shop()
    old = without_positions(stage1_of(data, tmp_path / "old.ckpt"))
    whole = stage1_of(shop(0), tmp_path / "whole.ckpt")
    for number, path in enumerate((old, whole)):
        further = stage1_of(shop(), tmp_path / f"further-{number}.ckpt", ckpt_path=path, steps=2)
        again = stage1_of(shop(), tmp_path / f"again-{number}.ckpt", ckpt_path=further, steps=3)
        for refused in (further, again):
            with pytest.raises(CheckpointError, match="does not say which positions of domain 'shop' trained it"):
                load_stage1(refused, data.catalogue)
    with pytest.raises(CheckpointError, match="earlier version"):
        load_stage1(old, data.catalogue)
    held = stage1_of(shop(), tmp_path / "held.ckpt")
    load_stage1(stage1_of(shop(), tmp_path / "longer.ckpt", ckpt_path=held, steps=2), data.catalogue)


def test_the_state_of_a_silo_is_a_stage1_of_its_own_positions(tmp_path, federated_data, federated_trainer):
    federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data())
    state = sorted((tmp_path / "run" / "checkpoints").glob("state-*"))[-1]
    data = federated_data()
    data.setup()
    alpha, beta = data.domains.values()
    load_stage1(state / "clients" / "alpha.ckpt", alpha.catalogue)
    with pytest.raises(CheckpointError, match="other data"):
        load_stage1(state / "clients" / "alpha.ckpt", beta.catalogue)
    whole = alpha.without_holdout()
    whole.setup()
    with pytest.raises(CheckpointError, match="other positions"):
        load_stage1(state / "clients" / "alpha.ckpt", whole.catalogue)


def interrupted(*arguments, **settings):
    raise KeyboardInterrupt


def test_states_of_a_federation_that_name_no_positions_are_gone_on_from(
    tmp_path, monkeypatch, federated_data, federated_trainer
):
    with monkeypatch.context() as before:
        before.setattr(DomainDataModule, "state_dict", lambda self: {"fingerprint": self.domain.fingerprint})
        before.setattr(Client, "train_phase", interrupted)
        with pytest.raises(KeyboardInterrupt):
            federated_trainer(rounds=1, local_max_epochs=1).fit(small_distiller(), datamodule=federated_data())
    resumed = federated_trainer(rounds=2, local_max_epochs=1)
    resumed.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    assert resumed.loop.counters.round == 2
    state = sorted((tmp_path / "run" / "checkpoints").glob("state-*"))[-1]
    with pytest.raises(CheckpointError, match="does not say which positions"):
        load_stage1(state / "clients" / "alpha.ckpt", resumed.loop.clients["alpha"].datamodule.catalogue)


def test_a_student_that_was_not_trained_is_no_stage1_of_an_llm(tmp_path):
    """A distiller in its teacher's phase ranks by the teacher; user states and item table are still untrained."""
    data, fitting = shop(), trainer()
    fitting.fit(small_distiller(), datamodule=data)
    fitting.save_checkpoint(tmp_path / "teacher.ckpt")
    with pytest.raises(CheckpointError, match="FKDDistiller whose student has not been trained"):
        load_stage1(tmp_path / "teacher.ckpt", data.catalogue)
