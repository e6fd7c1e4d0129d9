"""The server takes a round's messages whole or refuses them whole; what it is made to hold against (T16, T17)."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import MessageError
from lightning_sfubm.federated.aggregation import KNNMix
from lightning_sfubm.federated.messages import pack
from lightning_sfubm.federated.robust import CoordinateMedian, Krum, TrimmedMean
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.server_optimizers import FedAdam
from lightning_sfubm.federated.weights import FedAvg, WeightAggregator

NAMES = "abcde"


def teacher(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"layer": torch.randn(3, 4, generator=generator), "bias": torch.randn(4, generator=generator)}


def vectors(seed: int, items: int = 12) -> Tensor:
    return normalize(torch.randn(items, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def build(weights: WeightAggregator | None = None, weighting: str = "uniform") -> Server:
    return Server(KNNMix(), 8, teacher(), weights if weights is not None else FedAvg(), weighting)


def update(server: Server, client: str, tensors: dict[str, Tensor], round: int = 1) -> bytes:
    assert server.teacher is not None
    return pack(server.teacher, client, round, tensors).payload


def updates(server: Server, round: int = 1) -> dict[str, bytes]:
    return {name: update(server, name, teacher(ord(name)), round) for name in NAMES}


def raw(payload: bytes, change: Callable[[dict[str, Tensor]], Any], **fields: str) -> bytes:
    """The message with other tensors or fields, as somebody without our :func:`pack` would make it."""
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])["__metadata__"]
    tensors = load(payload)
    change(tensors)
    return save(tensors, metadata={**header, **fields})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "NaN": (lambda p: raw(p, lambda t: t["bias"].fill_(float("nan"))), "NaN"),
    "infinite": (lambda p: raw(p, lambda t: t["bias"].fill_(float("-inf"))), "NaN or infinite"),
    "out of bounds": (lambda p: raw(p, lambda t: t["bias"].fill_(1e5)), "beyond"),
    "wrong shape": (lambda p: raw(p, lambda t: t.update(bias=torch.ones(5))), "shape"),
    "wrong type": (lambda p: raw(p, lambda t: t.update(bias=torch.ones(4, dtype=torch.float64))), "float32"),
    "missing key": (lambda p: raw(p, lambda t: t.pop("bias")), "lacks tensors"),
    "unknown key": (lambda p: raw(p, lambda t: t.update(items=torch.ones(4))), "unknown tensors"),
    "a number of examples nobody asked for": (lambda p: raw(p, lambda t: t.update(__weight__=torch.ones(1))), "weight"),
    "oversized": (lambda p: p + bytes(2 << 20), "exceeds the limit"),
    "cut off": (lambda p: p[:-1], "safetensors"),
    "empty": (lambda p: b"", "safetensors"),
    "a pickle": (lambda p: b"\x80\x04." + p, "safetensors"),
    "of another round": (lambda p: raw(p, lambda t: None, round="1"), "round 1 arrived in round 2"),
    "of another client": (lambda p: raw(p, lambda t: None, client="b"), "channel of 'e'"),
    "of another kind": (lambda p: raw(p, lambda t: None, kind="semantics"), "kind"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_one_bad_message_changes_nothing_and_the_others_still_count(make: Any, words: str) -> None:
    server, expected = build(FedAdam()), build(FedAdam())
    for each in (server, expected):
        each.aggregate_teacher(1, updates(each))
    before = server.state_dict()
    sent = updates(server, round=2)
    sent["e"] = make(sent["e"])
    with pytest.raises(MessageError, match=words):
        server.aggregate_teacher(2, sent)
    assert same(server.state_dict(), before)
    del sent["e"]
    assert server.aggregate_teacher(2, sent)
    expected.aggregate_teacher(2, {name: payload for name, payload in updates(expected, 2).items() if name != "e"})
    assert same(server.global_teacher, expected.global_teacher)
    assert not same(server.global_teacher, before["global_teacher"])


def test_a_message_counts_once_also_after_a_restart() -> None:
    server = build()
    sent = updates(server)
    server.aggregate_teacher(1, sent)
    restarted = build()
    restarted.load_state_dict(server.state_dict())  # type: ignore[arg-type]
    for each in (server, restarted):
        before = each.state_dict()
        with pytest.raises(MessageError, match="replay"):
            each.aggregate_teacher(1, sent)
        with pytest.raises(MessageError, match="round 1 arrived in round 2"):
            each.aggregate_teacher(2, sent)
        assert same(each.state_dict(), before)


def test_item_vectors_are_refused_whole_too() -> None:
    server = build()
    sent = {name: pack(server.semantics, name, 0, {"vectors": vectors(ord(name))}).payload for name in "ab"}
    stretched = raw(sent["b"], lambda t: t["vectors"].mul_(2))
    for bad, words in ((stretched, "unit"), (sent["a"], "channel of 'b'"), (b"", "safetensors")):
        with pytest.raises(MessageError, match=words):
            server.aggregate_semantics(0, {**sent, "b": bad})
    answers = server.aggregate_semantics(0, sent)
    assert set(answers) == {"a", "b"}
    with pytest.raises(MessageError, match="replay"):
        server.aggregate_semantics(0, sent)


def test_weights_of_examples_are_those_that_were_sent_and_a_client_without_any_is_ignored() -> None:
    def weighed(weights: dict[str, float]) -> dict[str, Tensor]:
        server = build(weighting="examples")
        sent = {n: update(server, n, {**teacher(ord(n)), "__weight__": Tensor([w])}) for n, w in weights.items()}
        changed = server.aggregate_teacher(1, sent)
        assert changed == any(weights.values())
        assert server.version == int(changed)
        return server.global_teacher

    with_idle, without = weighed({"a": 3, "b": 1, "c": 0}), weighed({"a": 3, "b": 1})
    assert same(with_idle, without)
    for key, value in without.items():
        expected = 0.75 * teacher(ord("a"))[key] + 0.25 * teacher(ord("b"))[key]
        torch.testing.assert_close(value, expected)
    assert same(weighed({"a": 5, "c": 0}), teacher(ord("a")))  # one client is the identity
    assert same(weighed({"a": 0, "c": 0}), teacher())  # nobody has anything to say: as it was


@pytest.mark.parametrize("aggregator", [FedAvg(), FedAdam(), CoordinateMedian()], ids=lambda a: type(a).__name__)
def test_the_order_in_which_messages_arrive_changes_no_bit(aggregator: WeightAggregator) -> None:
    results = []
    for order in (NAMES, NAMES[::-1], "cabed"):
        server = build(aggregator)
        sent = updates(server)
        server.aggregate_teacher(1, {name: sent[name] for name in order})
        results.append(server.global_teacher)
        aggregator.load_state_dict({})
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("poison", ["far away", "the other way", "just outside"])
@pytest.mark.parametrize("aggregator", [CoordinateMedian(), TrimmedMean(), Krum()], ids=lambda a: type(a).__name__)
def test_one_poisoned_message_of_five_does_not_move_a_robust_mean(aggregator: WeightAggregator, poison: str) -> None:
    """Honest clients went from the global teacher to nearly the same place; one, whichever it is, sends something else."""
    start = teacher()
    goal = {key: value + 1 for key, value in start.items()}
    honest = {n: {k: v + 0.05 * teacher(ord(n))[k] for k, v in goal.items()} for n in NAMES}
    for culprit in NAMES:
        others = {key: torch.stack([honest[n][key] for n in NAMES if n != culprit]) for key in goal}
        sent = {
            "far away": {key: torch.full_like(value, 9999.0) for key, value in goal.items()},
            "the other way": {key: value - 10 for key, value in start.items()},
            "just outside": {key: value.amax(0) + 0.2 for key, value in others.items()},
        }[poison]
        servers = {"robust": build(aggregator), "mean": build()}
        for server in servers.values():
            messages = {n: update(server, n, sent if n == culprit else honest[n]) for n in NAMES}
            server.aggregate_teacher(1, messages)
        for key, clean in others.items():
            value = servers["robust"].global_teacher[key]
            assert (value >= clean.amin(0) - 1e-6).all()
            assert (value <= clean.amax(0) + 1e-6).all()
        moved = [
            max(float((s.global_teacher[k] - others[k].mean(0)).abs().max()) for k in goal) for s in servers.values()
        ]
        assert moved[0] < 0.15  # three standard deviations of honest weights
        if poison != "just outside":
            assert moved[1] > 1.9
