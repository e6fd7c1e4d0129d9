"""What one silo sends can cost that silo its round and no more; what the server keeps in its folder, and for how long."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.federated.envelopes import Reply, Request, describe_shapes, read_shapes
from tests.federated.machines import HASTY, coordinator


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
