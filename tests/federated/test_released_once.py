"""What left is not released again in another form: under a secret made anew, or from a state that was lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import CheckpointError, PrivacyError
from lightning_sfubm.federated.checkpoint import stored_states
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.messages import pack, unpack
from tests.federated.test_silo import hello, private

__all__ = ["hello"]  # a fixture


def lose_newest_state(tmp_path: Path) -> None:
    (stored_states(tmp_path / "silo/alpha/checkpoints")[-1] / "server.ckpt").write_bytes(b"")


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
