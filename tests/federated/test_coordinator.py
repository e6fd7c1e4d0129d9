"""What one silo sends can cost that silo its round and no more; what the server keeps in its folder, and for how long."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.envelopes import Reply, Request, describe_shapes, read_shapes
from lightning_sfubm.federated.messages import MessageSchema, unpack
from tests.federated.machines import HASTY, coordinator


def with_nonce(schema: MessageSchema, payload: bytes, nonce: str) -> bytes:
    """The same message under another nonce."""
    return payload.replace(unpack(schema, payload).nonce.encode(), nonce.encode()) if payload else b""


def test_a_silo_that_reuses_its_nonce_drops_out_alone(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a round and in an exchange, also where the coordinator was started again in between."""
    names, schedule = ["alpha", "beta", "gamma"], {"rounds": 2, "local_max_epochs": 1, "joins": {"gamma": 2}}
    transport, nonce, kills = machines(names, **schedule), "5" * 32, [2]

    def forge(name: str, request: Request, reply: Reply) -> Reply:
        if (request.action, request.round) == ("train", 2) and kills:
            kills.pop()
            raise KeyboardInterrupt
        if name != "beta" or request.action not in ("semantics", "train"):
            return reply
        assert driver.server.teacher is not None
        vectors = with_nonce(driver.server.semantics, reply.semantics, nonce)
        return replace(reply, semantics=vectors, teacher=with_nonce(driver.server.teacher, reply.teacher, nonce))

    transport.after = forge
    driver = coordinator(transport, tmp_path, names, **schedule)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    assert driver.progress.dropped == {"1": ["beta"], "2": ["beta", "beta"]}  # its vectors of the start were the first
    assert driver.server.version == 2
    assert f"'beta' dropped out (message refused: message {nonce} of client 'beta' was already received" in caplog.text


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"w": [1 << 30, 1 << 30, 1 << 30]}, "2 billion values .*'w'"),
        ({"a": [1 << 30], "w": [1 << 30, 2]}, "2 billion values .*'w'"),
        ({"a": [2], "w": [1] * 9}, "'w'.* 9 dimensions"),
        ({"a": [2], "w": [1] * 100_000}, "'w'.* 100000 dimensions"),
        ({"w": [4, 1 << 31]}, "'w'"),
        ({"w": [4, 0]}, "'w'"),
        ({"w": [4, True]}, "'w'"),
        ({"w": {}}, "'w'"),
        ({"w": "44"}, "'w'"),
        ({"w": None}, "'w' has no list"),
        ({"__weight__": [1]}, "'__weight__'"),
        ([["w", [4]]], "is not one"),
    ],
)
def test_shapes_are_bounded_before_anything_is_made_of_them(teacher: Any, reason: str) -> None:
    with pytest.raises(MessageError, match=f"shared weights.*{reason}"):
        read_shapes(json.dumps({"dim": 4, "teacher": teacher}))


def test_shapes_that_fit_are_read() -> None:
    shared = {"w": torch.zeros(3, 4, 2), "scale": torch.zeros(())}
    dim, template = read_shapes(describe_shapes(4, shared))
    assert (dim, {k: v.shape for k, v in template.items()}) == (4, {k: v.shape for k, v in shared.items()})


def test_a_silo_with_impossible_shapes_is_not_taken(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, schedule = ["alpha", "beta"], {"exchange": "teacher", "rounds": 1, "local_max_epochs": 1}
    transport = machines(names, **schedule)

    def boast(name: str, request: Request, reply: Reply) -> Reply:
        shape = json.dumps({"dim": 4, "teacher": {"w": [1 << 30] * 3}})
        return replace(reply, shape=shape) if name == "alpha" and reply.shape else reply

    transport.after = boast
    driver = coordinator(transport, tmp_path, names, HASTY, **schedule)
    with pytest.raises(ConfigError, match=r"1 silos came .* missing: \['alpha'\]"):
        driver.run()
    assert (
        "a silo is not taken: a silo describes shared weights of more than 2 billion values (with 'w')" in caplog.text
    )
