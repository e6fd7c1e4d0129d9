"""What left is not released again in another form: under a secret made anew, or from a state that was lost."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import CheckpointError, ConfigError, PrivacyError
from lightning_sfubm.experiment import Experiment
from lightning_sfubm.federated.checkpoint import stored_states
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.messages import pack, unpack
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.server import Server
from tests.conftest import small_distiller
from tests.federated.test_silo import hello, private

__all__ = ["hello"]  # a fixture


def lose_newest_state(tmp_path: Path) -> None:
    (stored_states(tmp_path / "silo/alpha/checkpoints")[-1] / "server.ckpt").write_bytes(b"")


def kept_files(tmp_path: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (tmp_path / "silo/alpha").rglob("*") if path.is_file()}


def ledger(tmp_path: Path) -> list[dict[str, object]]:
    return read_ledger(tmp_path / "silo/alpha/ledger.jsonl")


def test_a_silo_without_its_secret_sends_nothing(hello: Any, tmp_path: Path) -> None:
    """Each secret made anew would be another noise on the same vectors, and the mean of many has little."""
    make, request = hello()
    make().answer(request)
    ask = replace(request, action="semantics")
    sent = make().answer(ask).semantics
    key = tmp_path / "secrets/alpha.key"
    kept, lines = key.read_bytes(), ledger(tmp_path)
    for lost in (key.unlink, lambda: key.write_bytes(bytes(32))):
        lost()
        with pytest.raises(
            PrivacyError, match=r"secrets of \['alpha'\] in .* are not those that this run was begun with"
        ):
            make().answer(ask)
    assert ledger(tmp_path) == lines
    key.write_bytes(kept)
    schema = make().server.semantics
    again = unpack(schema, make().answer(ask).semantics).tensors["vectors"]
    assert torch.equal(again, unpack(schema, sent).tensors["vectors"])


def test_a_lost_first_state_does_not_release_a_round_twice(hello: Any, tmp_path: Path) -> None:
    """The number that keys the noise was in it: the same round would come with other noise."""
    make, request = hello([private(tmp_path)], exchange="teacher", rounds=3)
    train = replace(request, action="train", round=1)
    make().answer(request)
    make().answer(train)
    lose_newest_state(tmp_path)
    lines = ledger(tmp_path)
    with pytest.raises(CheckpointError, match=r"in round 1 'alpha' sent other weights .* nothing is sent"):
        make().answer(train)
    assert ledger(tmp_path) == lines


def test_a_silo_that_lost_all_of_its_states_sends_nothing(hello: Any, tmp_path: Path) -> None:
    """A ledger begun anew would forget what was spent."""
    make, request = hello([private(tmp_path)], exchange="teacher", rounds=3)
    train = replace(request, action="train")
    make().answer(request)
    make().answer(replace(train, round=1))
    shutil.rmtree(tmp_path / "silo/alpha/checkpoints")
    lines = ledger(tmp_path)
    for asked in (replace(train, round=1), replace(train, round=2), request):
        with pytest.raises(ConfigError, match=r"silo/alpha has the record of what left it, but no state"):
            make().answer(asked)
    assert ledger(tmp_path) == lines


def test_no_run_begins_or_goes_on_alone_where_a_silo_keeps_its_part(
    hello: Any, tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    make, request = hello(rounds=3)
    make().answer(request)
    make().answer(replace(request, action="train", round=1))
    before = kept_files(tmp_path)
    trainer = federated_trainer(
        "silo/alpha", callbacks=[PrivacyNoise(0.05, str(tmp_path / "secrets"))], exchange="both", rounds=3
    )
    data = federated_data(domains=3, num_users=30)
    data.domains = {"alpha": data.domains["alpha"]}
    with pytest.raises(ConfigError, match="holds a silo's part of a federated run and the record of what left it"):
        Experiment(methods=["popularity"], sigmas=[]).run(trainer, small_distiller(), data)
    with pytest.raises(CheckpointError, match="the 3 rounds of a federated run are not over, and the rest"):
        trainer.fit(small_distiller(), datamodule=data, ckpt_path="last")
    with pytest.raises(
        CheckpointError, match="client 'alpha' has not been through student there, so what it ranks by is"
    ):
        trainer.test(small_distiller(), datamodule=data, ckpt_path="last")
    after = kept_files(tmp_path)
    assert after == before


def test_a_lost_state_and_another_teacher_do_not_release_a_round_twice(hello: Any, tmp_path: Path) -> None:
    make, request = hello([private(tmp_path)], exchange="teacher", rounds=3)
    train = replace(request, action="train")
    make().answer(request)
    make().answer(replace(train, round=1))
    make().answer(replace(train, round=2))
    lose_newest_state(tmp_path)
    server = make().server
    assert server.broadcast_schema is not None
    weights = {key: torch.zeros_like(value) for key, value in server.global_teacher.items()}
    teacher = pack(server.broadcast_schema, "server", 1, weights).payload
    with pytest.raises(CheckpointError, match=r"in round 2 'alpha' sent other weights .* both would count once"):
        make().answer(replace(train, round=2, teacher=teacher))
    lose_newest_state(tmp_path)  # that of the refused training
    again = make().answer(replace(train, round=2)).teacher  # the same once more: nothing new is spent
    assert again
    assert ledger(tmp_path)[-1].get("resent")


@pytest.mark.parametrize("lost", [False, True])
def test_masks_do_not_hide_whether_a_private_round_is_released_twice(
    lost: bool, federated_data: Any, federated_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the masked inputs: the same weights are known again under other masks, and others are refused."""
    pytest.importorskip("cryptography")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    def run(**flags: Any) -> Any:
        settings = {
            "exchange": "teacher",
            "secure_aggregation": SecureAggregation(),
            "rounds": 1,
            "local_max_epochs": 1,
        }
        trainer = federated_trainer(callbacks=[private(tmp_path)], **settings, flags={"limit_val_batches": 1})
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=40), **flags)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(Server, "take_mean", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    folder = tmp_path / "run"
    before = read_ledger(folder / "ledger.jsonl")
    masked = [line for line in before if line["kind"] == "secagg masked input"]
    assert [line["client"] for line in masked] == ["alpha", "beta"]
    assert all("differential privacy" in line["mechanism"] for line in masked)
    if lost:  # with the number in it that keys the noise: the round would be trained anew, with other noise
        shutil.rmtree(folder / "checkpoints")
        with pytest.raises(CheckpointError, match="in round 1 'alpha' sent other weights with differential privacy"):
            run(ckpt_path="last")
        assert read_ledger(folder / "ledger.jsonl") == before
        return
    again = read_ledger(run(ckpt_path="last").run_dir / "ledger.jsonl")[len(before) :]
    resent = [line for line in again if line["kind"] == "secagg masked input"]
    assert [line.get("resent") for line in resent] == [True, True]
    assert [line["content_sha256"] for line in resent] == [line["content_sha256"] for line in masked]
    assert {line["sha256"] for line in resent}.isdisjoint(line["sha256"] for line in masked)
