"""A guarantee of a run is stated only where a bound covers every message made of users' data, and never on doubt."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sfubm.audit.attack import AuditSettings, _member_facts
from lightning_sfubm.audit.facts import mechanisms, rests_on_seed
from lightning_sfubm.audit.guarantee import content_of, coverage, guarantee
from lightning_sfubm.audit.replay import Update, replay
from lightning_sfubm.audit.report import build_privacy_report
from lightning_sfubm.federated.ledger import INITIAL_WEIGHTS, TEXTS_ALONE, UNTRAINED, Ledger
from lightning_sfubm.privacy.attacks import area_limit, rate_limit
from tests.audit.test_report import checkpoint, in_words

SECURE = {"secure aggregation": "threshold 0.6"}
NOISE = {"mechanism": "Gaussian perturbation", "sigma": 0.05, "content": TEXTS_ALONE}


def private(epsilon: Any = 2.0, **changed: Any) -> dict[str, Any]:
    stated = {"mechanism": "DP-SGD over users", "neighbours": "one user's whole sequence added or removed"}
    return {"differential privacy": {**stated, "epsilon": epsilon, "delta": 1e-5, **changed}}


def up(client: str, round: int, mechanism: dict[str, Any], kind: str = "teacher") -> dict[str, Any]:
    return {"client": client, "direction": "up", "kind": kind, "round": round, "mechanism": mechanism}


def report(folder: Path, lines: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.start()
    for number, line in enumerate(lines):
        payload = str(number).encode()
        ledger.record_bytes(line["client"], line["direction"], line["kind"], line["round"], payload, line["mechanism"])
    checkpoint(folder)
    path = build_privacy_report(folder)
    return json.loads(path.with_suffix(".json").read_text()), path.read_text()


def test_kinds_that_are_not_known_are_taken_for_users_data() -> None:
    kinds = ("semantics", "semantics secagg masked input", "teacher", "secagg masked input", "anything", "")
    assert [content_of(up("a", 0, {}, kind)) for kind in kinds] == ["user"] * 6
    texts = [content_of(up("a", 0, {"content": TEXTS_ALONE}, kind)) for kind in kinds]
    assert texts == ["item", "item", "user", "user", "user", "user"]
    steps = [f"{of}secagg {step}" for of in ("", "semantics ") for step in ("keys", "shares", "unmask")]
    assert {content_of(up("a", 3, {}, step)) for step in steps} == {None}
    assert content_of(up("a", 0, {}, "teacher secagg keys")) == "user"


def test_what_was_not_trained_is_said_by_its_line() -> None:
    """Item vectors that come again may have learnt from users; weights of round 0 are the seed's where the line says so."""
    assert content_of(up("a", 0, {}, "semantics")) == content_of(up("a", 3, {}, "semantics")) == "user"
    assert content_of(up("a", 3, {"content": UNTRAINED}, "semantics")) == "item"
    assert content_of(up("a", 3, {"content": TEXTS_ALONE}, "semantics")) == "item"
    assert content_of(up("a", 0, {"content": INITIAL_WEIGHTS})) is None
    assert content_of(up("a", 1, {"content": INITIAL_WEIGHTS})) == "user"
    assert content_of(up("a", 1, {"content": TEXTS_ALONE})) == "user"
    lines = [up("a", 0, {"content": INITIAL_WEIGHTS}), up("a", 1, private(1.0))]
    assert guarantee(lines, [])["standing"] == "all"


def test_noise_that_follows_from_the_seed_makes_no_guarantee_but_a_simulated_one(tmp_path: Path) -> None:
    own, seed = (
        private(1.0, secret=text) for text in ("kept by the client", "derived from the run's seed (simulation only)")
    )
    assert guarantee([up("a", 1, own), up("b", 1, own)], [])["standing"] == "all"
    assert guarantee([up("a", 1, own), up("b", 1, seed)], [])["standing"] == "simulated"
    assert guarantee([up("a", 1, own), up("b", 1, seed)], ["the end is missing"])["standing"] == "unknown"
    facts, page = report(tmp_path, [up("a", 1, seed)])
    words = in_words(facts, "guarantee")
    assert facts["guarantee"]["standing"] == "simulated"
    assert [row["standing"] for row in facts["mechanisms"]] == ["simulated"]
    assert "Simulated: the noise follows from the run's seed" in page
    assert '<td class="text clear">simulated</td>' in page
    assert (
        "a, weights of the shared model (numbers computed from user behaviour): no, but in this simulation a" in words
    )
    assert "if nobody knows the run's seed, whatever else the attacker knows, a test" in words
    assert "Nothing is promised against somebody who knows the seed" in words


def test_what_rests_on_the_seed_is_found_beside_what_cannot_be_read() -> None:
    seeded = up("b", 1, private(secret="derived from the run's seed (simulation only)"))
    lines = [up("a", 1, {"differential privacy": "yes"}), up("a", 1, private(secret="kept by the client")), seeded]
    assert [rests_on_seed(lines, name) for name in ("a", "b", "")] == [False, True, True]


def test_a_run_whose_messages_are_all_covered_has_one(tmp_path: Path) -> None:
    lines = [
        up("a", 0, NOISE, "semantics"),
        up("a", 1, private(1.0)),
        up("b", 1, private(3.0)),
        up("a", 2, private(2.0)),
    ]
    facts, page = report(tmp_path, lines)
    assert facts["guarantee"] == {"standing": "all", "messages": 3, "unprotected": [], "doubts": []}
    words = in_words(facts, "guarantee")
    assert "each of the 3 messages made from user behaviour left with differential privacy" in words
    assert words.count("a bound for its own users") == 2
    assert page.count("epsilon 2 at delta 1e-05") == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_one_unprotected_message_takes_it_away(tmp_path: Path, order: tuple[int, ...]) -> None:
    teacher = [up("a", 1, {}), up("a", 2, private(1.0)), up("a", 3, private(2.0))]
    facts, page = report(tmp_path, [teacher[i] for i in order])
    assert facts["guarantee"]["standing"] == "none"
    (row,) = facts["guarantee"]["unprotected"]
    assert row == {"client": "a", "kind": "teacher", "messages": 1, "of": 3, "hidden": 0}
    words = in_words(facts, "guarantee")
    assert "this run as a whole has no guarantee. Of 3 messages made from user behaviour, 1 left without" in words
    assert "a, 1 of 3 with weights of the shared model" in words
    assert {row["standing"] for row in facts["mechanisms"]} == {"unproven", "none"}
    for promise in ("a bound for its own", "on average at most", "epsilon 2 ", ": yes", "persons, yes"):
        assert promise not in page


def test_another_client_keeps_its_own_bound_and_no_more(tmp_path: Path) -> None:
    lines = [up("a", 1, private()), up("b", 1, SECURE, "secagg masked input"), up("b", 1, SECURE, "secagg keys")]
    facts, _ = report(tmp_path, lines)
    words = in_words(facts, "guarantee")
    assert words.startswith("For persons, no: this run as a whole has no guarantee. Of 2 messages")
    assert "b, 1 of 1 with masked weights" in words
    assert "(1 of them hidden from the server, which bounds nothing)" in words
    assert "a, weights of the shared model (numbers computed from user behaviour): a bound for its own users." in words


def test_item_vectors_alone_need_none_for_persons(tmp_path: Path) -> None:
    facts, _ = report(tmp_path, [up("a", 0, NOISE, "semantics")])
    assert facts["guarantee"]["standing"] == "nothing sent"
    assert "no message made from user behaviour left" in in_words(facts, "guarantee")


@pytest.mark.parametrize(
    "mechanism",
    [
        {},
        NOISE,
        SECURE,
        {"differential privacy": "yes"},
        private(None),
        private(math.inf),
        private(math.nan),
        private(-1.0),
        private("2"),
        private(delta=None),
        private(delta=1.0),
        private(neighbours=None),
        private(protects="item"),
    ],
)
def test_what_is_no_finite_bound_for_users_protects_nothing(mechanism: dict[str, Any]) -> None:
    assert guarantee([up("a", 1, mechanism), up("a", 2, private())], [])["standing"] == "none"
    rows = mechanisms([up("a", 1, mechanism), up("a", 2, private())])
    assert rows
    assert not any(row["standing"] == "guarantee" for row in rows)


def test_numbers_of_examples_beside_the_weights_are_not_covered() -> None:
    line = up("a", 1, private()) | {"tensors": {"__weight__": {"shape": [1]}}}
    assert guarantee([line], [])["standing"] == "none"


@pytest.mark.parametrize(
    "lines",
    [
        [up("a", 1, private(2.0)), up("a", 2, private(1.0))],
        [up("a", 1, private(1.0)), up("a", 2, private(3.0)), up("a", 3, private(2.0))],
        [up("a", 1, private()), up("a", 2, private(delta=1e-6))],
        [up("a", 1, private()), up("a", 2, private(neighbours="one interaction"))],
        [up("a", 1, private(adversary="the server")), up("a", 2, private())],
        [up("a", 1, private(secret="derived (simulation only)")), up("a", 2, private(secret="kept by the client"))],
        [up("a", 1, private()), up("a", 1, private(), "something else")],
    ],
)
def test_bounds_that_do_not_add_up_are_not_known(lines: list[dict[str, Any]]) -> None:
    found = guarantee(lines, [])
    assert found["standing"] == "unknown"
    assert found["doubts"][0].startswith("a: ")
    assert {row["standing"] for row in mechanisms(lines)} == {"unproven"}


def test_a_doubt_about_the_ledger_leaves_none() -> None:
    lines = [up("a", 1, private())]
    assert guarantee(lines, ["the end is missing"])["standing"] == "unknown"
    assert guarantee([], ["the end is missing"])["standing"] == "unknown"
    assert guarantee([up("a", 1, {})], ["the end is missing"])["standing"] == "none"
    assert [row["standing"] for row in mechanisms(lines, established=False)] == ["unproven"]


def test_what_was_sent_again_counts_once() -> None:
    again = up("a", 1, {}) | {"resent": True}
    assert coverage([up("a", 1, {}), again])[0]["messages"] == 1


def test_no_limit_stands_beside_an_attack_where_an_earlier_message_had_no_bound() -> None:
    class Sent:
        tensors: dict[str, Any] = {}

    class Nobody:
        pass

    def no_vectors(name: str) -> Any:
        raise AssertionError("item vectors were not sent")

    def privacy(first: dict[str, Any]) -> list[Any]:
        lines = []
        for number, mechanism in ((1, first), (2, private())):
            lines.append(up("a", number, mechanism) | {"content_sha256": f"{number} up"})
            lines.append(lines[-1] | {"direction": "down", "mechanism": {}, "content_sha256": f"{number} down"})
        _, updates = replay([(line, Sent()) for line in lines], lines, {"a": Nobody()}, {}, no_vectors)  # type: ignore[misc]
        return [update.privacy.get("epsilon") for update in updates if update.round == 2]

    assert privacy(private(1.0)) == [2.0, 2.0]  # the client's own, and the aggregated one
    assert privacy({}) == [None, None]


@pytest.mark.parametrize("bound", [{"epsilon": 0.5, "delta": 1e-3}, {}])
def test_the_limit_beside_an_attack_is_that_of_the_attacked_update(bound: dict[str, float]) -> None:
    who: Any = SimpleNamespace(member=torch.arange(40) < 20)
    row = _member_facts("a", Update("a", 1, {}, {}, {}, bound), "loss", torch.arange(40.0), who, AuditSettings())
    expected = {"auc": area_limit(**bound), "tpr": rate_limit(**bound, false_positives=0.01)} if bound else None
    assert row["limit"] == expected
    assert (row["members"], row["others"], row["auc"]["value"]) == (20, 20, 0.0)


def test_two_messages_of_the_same_steps_are_no_bound_for_both() -> None:
    """A client that went back to an earlier state spends again what its accountant does not know of."""
    grows = [up("a", 1, private(1.0, steps=4)), up("a", 2, private(2.0, steps=8))]
    assert guarantee(grows, [])["standing"] == "all"
    twice = [*grows, up("a", 3, private(2.0, steps=8))]
    facts = guarantee(twice, [])
    assert facts["standing"] == "unknown"
    assert facts["doubts"] == [
        "a: two of its messages state the same steps of training, so that the later one does not count what the other spent"
    ]


def test_a_line_that_says_it_was_sent_again_counts_unless_it_was() -> None:
    first = up("a", 1, private(1.0))
    again = {**first, "resent": True}
    assert guarantee([first, again], [])["messages"] == 1
    assert guarantee([first, {**up("a", 2, {}), "resent": True}], [])["standing"] == "none"
