"""Two hundred clients, a few of them a round."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.federated.ledger import read_ledger
from tests.conftest import small_distiller

CLIENTS = [f"silo{number:03d}" for number in range(200)]


@pytest.mark.slow
def test_two_hundred_clients(
    federated_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.ERROR)
    text = HashingTextEncoder(dim=16)
    reader = SyntheticReader(num_users=12, num_items=30, mean_length=6)  # all silos read the same: it is prepared once
    data = FederatedDataModule(
        {
            name: DomainDataModule(
                name, reader, text_encoder=text, k_core=0, num_candidates=5, max_length=16, batch_size=16
            )
            for name in CLIENTS
        }
    )
    trainer = federated_trainer(exchange="teacher", rounds=3, participation=0.02)
    trainer.prepare(small_distiller(), data)
    loop = trainer.loop
    monkeypatch.setattr(type(loop.clients[CLIENTS[0]].module), "local_phases", ())  # the rounds alone
    loop.run()
    sent = [entry for entry in read_ledger(trainer.run_dir / "ledger.jsonl") if entry["direction"] == "up"]
    rounds = [{e["client"] for e in sent if e["round"] == number} for number in (1, 2, 3)]
    assert [len(clients) for clients in rounds] == [4, 4, 4]
    assert len(set.union(*rounds)) > 4  # drawn anew for every round
    assert loop.server.version == 3
    shared = loop.server.global_teacher
    for client in loop.clients.values():  # also those that were never drawn hold the last teacher
        state = client.module.shared_state()
        assert all(torch.equal(state[name], value) for name, value in shared.items())
