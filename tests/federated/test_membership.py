"""Who takes part: nodes that are slow, mute, away or new, on a clock that runs (T17, T30)."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.envelopes import Reply, Request
from lightning_sfubm.federated.membership import Membership, Patience

NAMES = {1: "alpha", 2: "beta", 3: "gamma", 4: "delta"}
WAIT = 1.0  # a round for who is new
HELLO = Request("hello", "0" * 32, 0, "{}")


class Clocked:
    """Nodes that come and answer when their time has come; a request without an answer is waited for, as Flower does.

    Args:
        delays: seconds to the answer by node; one that is not named never answers.
        since: seconds after which a node is connected, where not from the start.
    """

    def __init__(self, delays: Mapping[int, float], since: Mapping[int, float] | None = None) -> None:
        self.delays, self.since, self.started = dict(delays), dict(since or {}), time.monotonic()
        self.asked: list[int] = []
        self.due: dict[int, tuple[float, float]] = {}
        self.away: set[int] = set()
        self.failing: set[int] = set()

    def nodes(self) -> dict[int, str]:
        passed = time.monotonic() - self.started
        return {n: "" for n in NAMES if passed >= self.since.get(n, 0.0) and n not in self.away}

    def ask(self, requests: Mapping[int, Request], deadline_s: float) -> dict[int, Reply]:
        self.asked += sorted(requests)
        slowest = max(self.delays.get(node, deadline_s) for node in requests)
        time.sleep(min(slowest, deadline_s))
        return {node: Reply(NAMES[node]) for node in requests if self.delays.get(node, deadline_s) < deadline_s}

    def send(self, requests: Mapping[int, Request], deadline_s: float) -> None:
        self.asked += sorted(requests)
        now = time.monotonic()
        self.due |= {n: (now + self.delays.get(n, float("inf")), now + deadline_s) for n in requests}

    def arrived(self) -> dict[int, Reply | None]:
        now = time.monotonic()
        lost = {n for n, (_, expires) in self.due.items() if n in self.failing or now > expires}
        came = {n for n, (due, _) in self.due.items() if now >= due}
        self.due = {n: times for n, times in self.due.items() if n not in lost | came}
        return {node: None if node in lost else Reply(NAMES[node]) for node in lost | came}


def members(transport: Any, silos: list[str], **patience: float) -> Membership:
    given = {"start_s": 3.0, "round_s": 3.0, "poll_s": 0.02, "hello_s": WAIT, **patience}
    return Membership(silos, transport, Patience(**given), lambda reply: None)


def took(function: Any, *args: Any) -> float:
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


def greet(group: Membership) -> float:
    return took(group.greet, lambda: HELLO)


def test_a_node_that_never_answers_keeps_nobody_from_the_start() -> None:
    """Node 4 is mute; beta connects after it was asked, and takes a while to prepare its data."""
    transport = Clocked({1: 0.0, 2: 0.3, 3: 0.0}, since={2: 0.2, 3: 9.0})
    group = members(transport, ["alpha", "beta"])
    assert took(group.gather, ["alpha", "beta"], 2, lambda: HELLO) < 2.5
    assert group.known == {"alpha": 1, "beta": 2}
    assert sorted(transport.asked) == [1, 2, 4]  # each once


def test_who_prepares_its_data_longer_than_a_round_waits_is_there_at_the_start() -> None:
    transport = Clocked({1: 0.0, 2: 1.0}, since={3: 9.0, 4: 9.0})
    group = members(transport, ["alpha", "beta"], hello_s=0.05)
    assert took(group.gather, ["alpha", "beta"], 2, lambda: HELLO) > 0.9
    assert transport.asked == [1, 2]
    late = members(Clocked({1: 0.0, 2: 1.0}, since={3: 9.0, 4: 9.0}), ["alpha", "beta"], start_s=0.2)
    with pytest.raises(ConfigError, match=r"1 silos came within 0\.2 s"):
        late.gather(["alpha", "beta"], 2, lambda: HELLO)


def test_a_round_waits_for_a_new_node_once_and_takes_it_whenever_it_answers() -> None:
    transport = Clocked({1: 0.0, 2: 2.5}, since={3: 9.0})  # node 4 is mute
    group = members(transport, ["alpha", "beta"])
    assert greet(group) > 0.8 * WAIT
    assert list(group.known) == ["alpha"]
    assert greet(group) < 0.6 * WAIT  # not again
    assert greet(group) < 0.6 * WAIT
    time.sleep(max(0.0, transport.started + 2.7 - time.monotonic()))
    assert greet(group) < 0.6 * WAIT
    assert group.known == {"alpha": 1, "beta": 2}
    assert sorted(transport.asked) == [1, 2, 4]


def test_a_new_node_that_answers_soon_takes_part_in_the_round() -> None:
    transport = Clocked({1: 0.0, 2: 0.2}, since={2: 1.5, 3: 9.0})
    group = members(transport, ["alpha", "beta"])
    greet(group)
    time.sleep(max(0.0, transport.started + 1.6 - time.monotonic()))
    assert greet(group) < 0.8 * WAIT  # for beta alone: the mute node 4 has had its time
    assert group.known == {"alpha": 1, "beta": 2}
    transport.since[3] = 0.0
    assert greet(group) < 0.6 * WAIT  # all silos are there: a further node can be none of them


def test_a_node_is_asked_again_where_its_answer_is_lost() -> None:
    """It was away, its task failed, or its time is over; for the last two no round waits."""
    transport = Clocked({1: 0.0}, since={3: 9.0, 4: 9.0})
    group = members(transport, ["alpha", "beta"], start_s=4.0, round_s=4.0)
    greet(group)
    transport.away = {2}
    greet(group)
    transport.away = set()
    assert greet(group) > 0.8 * WAIT
    assert transport.asked == [1, 2, 2]
    transport.failing = {2}
    greet(group)
    transport.failing = set()
    assert greet(group) < 0.6 * WAIT
    assert transport.asked == [1, 2, 2, 2]
    time.sleep(4.1)
    transport.delays[2] = 0.0
    greet(group)
    assert transport.asked == [1, 2, 2, 2, 2]
    assert group.known == {"alpha": 1, "beta": 2}
