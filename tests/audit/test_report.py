"""The privacy report from a ledger alone and from figures: what it promises in words, its self-check, its refusals."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.audit import words
from lightning_sfubm.audit.facts import mechanisms
from lightning_sfubm.audit.plots import epsilon_plot, rounds_plot, sigma_plot
from lightning_sfubm.audit.report import build_privacy_report
from lightning_sfubm.audit.words import epsilon_words
from lightning_sfubm.federated.ledger import TEXTS_ALONE, Ledger
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from lightning_sfubm.privacy.attacks import area_interval

NOISE = {
    "mechanism": "Gaussian perturbation (heuristic ...)",
    "sigma": 0.05,
    "drawn": "once per item",
    "content": TEXTS_ALONE,
}
PRIVATE = {
    "mechanism": "DP-SGD over users",
    "neighbours": "one user's whole sequence added or removed",
    "epsilon": 2.0,
    "delta": 1e-5,
    "steps": 40,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.start()
    vectors = {"vectors": {"shape": [7, 4], "dtype": "float32"}}
    ledger.record_bytes("shop <a>", "up", "semantics", 0, b"12345", NOISE, vectors)
    first = {**PRIVATE, "epsilon": 1.0, "steps": 20}
    ledger.record_bytes("shop <a>", "up", "teacher", 1, b"123", {"differential privacy": first})
    ledger.record_bytes("shop <a>", "up", "teacher", 2, b"1234", {"differential privacy": PRIVATE})
    ledger.record_bytes("shop <a>", "down", "teacher", 2, b"1", {})
    checkpoint(tmp_path)
    return tmp_path


def checkpoint(run_dir: Path, lines: int | None = None) -> Path:
    """Put a state in place that says how many lines there were; by default as many as there are."""
    if lines is None:
        lines = len((run_dir / "ledger.jsonl").read_text().splitlines())
    loop = run_dir / "checkpoints" / "state-0001" / "loop.json"
    loop.parent.mkdir(parents=True, exist_ok=True)
    loop.write_text(json.dumps({"stored": {"ledger": lines}}))
    return loop


def in_words(facts: dict[str, Any], question: str) -> str:
    return " ".join(s for entry in facts["in_plain_words"] if question in entry["question"] for s in entry["answer"])


def facts_of(report: Path) -> dict[str, Any]:
    return json.loads(report.with_suffix(".json").read_text())


@pytest.mark.parametrize(("lines_then", "holds"), [(0, True), (3, False), (None, None)])
def test_an_empty_ledger_is_right_only_where_nothing_was_sent(
    tmp_path: Path, lines_then: int | None, holds: bool | None
) -> None:
    """Nothing sent; a ledger that was emptied afterwards; nobody knows how many lines there were."""
    Ledger(tmp_path / "ledger.jsonl").start()
    if lines_then is not None:
        checkpoint(tmp_path, lines_then)
    facts = facts_of(build_privacy_report(tmp_path))
    assert facts["self_check"]["holds"] is holds


def test_a_ledger_is_enough_for_a_report(run_dir: Path) -> None:
    report = build_privacy_report(run_dir)
    facts, page = facts_of(report), report.read_text()
    assert facts["self_check"]["holds"] is True
    assert [row["holds"] for row in facts["self_check"]["rows"]] == [True, True, True, None, None]
    assert facts["ledger"]["bytes"] == {"up": 12, "down": 1}
    row = next(row for row in facts["communication"]["rows"] if row["kind"] == "semantics")
    assert (row["messages"], row["bytes"], row["tensors"]) == (1, 5, ["vectors 7×4 float32"])
    assert "shop &lt;a&gt;" in page
    assert "shop <a>" not in page
    assert "This was not measured" in page
    assert "2 messages of weights of the shared model" in page


def test_guarantees_and_heuristics_keep_their_names(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    noise, private = mechanisms(lines)
    assert (noise["standing"], noise["parameters"]["sigma"]) == ("heuristic", 0.05)
    assert (private["standing"], private["epsilon"], private["delta"]) == ("guarantee", 2.0, 1e-5)  # the last message's
    assert private["parameters"] == {"steps": 40}


@pytest.mark.parametrize(
    ("mechanism", "standings"),
    [
        ({}, ["none"]),
        ({"mechanism": "none", "sigma": 0.0}, ["none"]),
        ({"secure aggregation": "threshold 0.6"}, ["hidden"]),
        ({"secure aggregation": "threshold 0.6", "differential privacy": PRIVATE}, ["guarantee", "hidden"]),
    ],
)
def test_the_standing_of_a_mechanism(mechanism: dict[str, Any], standings: list[str]) -> None:
    line = {"client": "a", "direction": "up", "kind": "teacher", "mechanism": mechanism}
    down = {"client": "a", "direction": "down", "kind": "teacher", "mechanism": {}}
    keys = {"client": "a", "direction": "up", "kind": "secagg keys", "mechanism": {}}
    assert [row["standing"] for row in mechanisms([line, down, keys])] == standings


def test_epsilon_in_words() -> None:
    def words(epsilon: float | None, neighbours: str = "", protects: str = "user") -> str:
        return epsilon_words({"epsilon": epsilon, "delta": 1e-5, "neighbours": neighbours, "protects": protects})

    user = words(math.log(3), "one user's whole sequence added or removed")
    assert "wrongly accuses 1 % of those who took no part finds on average at most 3.01 % of those who did" in user
    assert "no test names the right one in more than 75.1 % of cases" in user  # (3 + 1e-5) / 4
    assert "except with a probability" not in user  # delta bounds no such chance
    assert "differ by one user's whole sequence added or removed" in user
    assert "1e-05" in user
    assert "next to nothing" not in user
    assert "next to nothing" in words(32.0)
    item = words(1.0, "one item of one organisation added or removed", "item")
    assert "names 1 % of the products that are not there finds on average at most 2.72 % of those that are" in item
    assert "person" not in item
    assert "whatever the attacker knows" in user
    assert "whatever the attacker knows" not in item  # an older ledger, which does not say
    assert "against whom is not stated, a test" in item
    assert "epsilon 1.01 at delta" in words(1.001)
    assert "one in more than 100 % of cases" in words(300.0)
    for nothing in (None, math.inf):
        assert "nothing is promised" in words(nothing)


def test_shares_of_noise_are_not_said_to_hold_against_everybody(tmp_path: Path) -> None:
    stated = SecureKMeans(epsilon=1.0, secret_dir=str(tmp_path / "keys")).describe(1) | {"content": TEXTS_ALONE}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.start()
    ledger.record_bytes("a", "up", "semantics secagg masked input", 0, b"1", stated)
    checkpoint(tmp_path)
    report = build_privacy_report(tmp_path)
    facts, page = facts_of(report), report.read_text()
    (row,) = (row for row in facts["mechanisms"] if row["standing"] == "guarantee")
    assert row["adversary"].endswith("any one other organisation, but not several together")
    assert "adversary" not in row["parameters"]
    assert f"against {row['adversary']}, a test on the messages" in in_words(facts, "guarantee")
    assert page.count(f"against {row['adversary']}") == 2  # in the table too
    assert "whatever the attacker knows" not in page


def test_noise_that_the_seed_gives_away_is_called_a_simulation(tmp_path: Path) -> None:
    for secret, simulated in (("kept by the client", False), ("derived from the run's seed (simulation only)", True)):
        ledger = Ledger(tmp_path / "ledger.jsonl")
        ledger.start()
        ledger.record_bytes("a", "up", "semantics", 0, b"1", {**NOISE, "secret": secret})
        answers = facts_of(build_privacy_report(tmp_path))["in_plain_words"]
        assert ("holds for a simulation only" in str(answers)) == simulated


def without_state(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def torn_state(run_dir: Path) -> None:
    checkpoint(run_dir).write_text("{")


def early_state(run_dir: Path) -> None:
    checkpoint(run_dir, lines=2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_state, "holds no checkpoint"),
        (torn_state, "state-0001/loop.json, the newest checkpoint, is missing or unreadable"),
        (early_state, "state-0001, the newest checkpoint, was written after 2 of them"),
    ],
)
def test_an_end_that_cannot_be_checked_is_not_said_to_hold(
    run_dir: Path, change: Callable[[Path], None], why: str
) -> None:
    change(run_dir)
    report = build_privacy_report(run_dir)
    facts, page = facts_of(report), report.read_text()
    whole = facts["self_check"]["rows"][0]
    assert facts["self_check"]["holds"] is whole["holds"] is None
    assert why in whole["detail"]
    assert why in in_words(facts, "trusted")
    assert "Only as far as the ledger goes" in in_words(facts, "trusted")
    assert "could not be finished" in page
    assert "found contradictions" not in page
    assert facts["guarantee"]["standing"] == "unknown"  # a message without protection may be among those missing
    assert why in in_words(facts, "guarantee")
    assert "on average at most" not in page


def test_a_changed_ledger_is_announced_at_the_top(run_dir: Path) -> None:
    path = run_dir / "ledger.jsonl"
    path.write_text(path.read_text().replace('"bytes": 5', '"bytes": 6'))
    report = build_privacy_report(run_dir)
    facts = facts_of(report)
    assert facts["self_check"]["holds"] is False
    assert facts["guarantee"]["standing"] == "unknown"
    assert "on average at most" not in report.read_text()
    assert "does not follow" in facts["self_check"]["problems"][0]
    assert report.read_text().index("Do not rely on this") < report.read_text().index("In plain words</h2>")


def test_an_audit_of_another_ledger_does_not_count(run_dir: Path) -> None:
    (run_dir / "audit.json").write_text(json.dumps({"check": {"head": "0" * 64, "problems": []}, "membership": []}))
    rows = facts_of(build_privacy_report(run_dir))["self_check"]["rows"]
    assert rows[-1]["holds"] is False


def test_a_broken_audit_file_is_named(run_dir: Path) -> None:
    (run_dir / "audit.json").write_text("{")
    report = build_privacy_report(run_dir)
    assert "audit.json: broken JSON" in report.read_text()
    assert facts_of(report)["audit"] is None


def test_what_comes_back_is_measured_or_said_not_to_be(run_dir: Path) -> None:
    ledger = Ledger(run_dir / "ledger.jsonl")
    ledger.resume(4)
    ledger.record_bytes("shop <a>", "down", "semantics", 0, b"1", {})
    missing = "the item vectors that come back was not measured"
    assert missing in in_words(facts_of(build_privacy_report(run_dir)), "products")
    row = {
        "client": "shop <a>",
        "round": 0,
        "items": 7,
        "attacked": 7,
        "foreign": 50,
        "cosine_mean": 0.8,
        "chance": 0.02,
    }
    row |= {"with_replacement": estimate(0.75), "without_answer": estimate(0.25), "copies": estimate(0.5)}
    audit = {"answers": [row | {"products_named": 5}]}
    (run_dir / "audit.json").write_text(json.dumps(audit))
    report = build_privacy_report(run_dir)
    words = in_words(facts_of(report), "products")
    assert missing not in words
    assert "the 50 products of the others, recognises in 75.0 % of the 7 answers tried" in words
    assert "25.0 % without the answer" in words
    assert "Linkage of answers" in report.read_text()


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 10}


def point(epsilon: float | None, sigma: float | None = 0.05) -> dict[str, Any]:
    score = {"auc": estimate(0.6), "tpr": estimate(0.1), "limit": {"auc": 0.9, "tpr": 0.3} if epsilon else None}
    utility = {"teacher": {"hit@1": estimate(0.3), "ndcg@10": estimate(0.4)}}
    linkage = {"with_replacement": estimate(0.9), "cosine_mean": 0.7}
    return {
        "domain": "a",
        "epsilon": epsilon,
        "simulated": epsilon == 0.5,
        "sigma": sigma,
        "membership": {"loss": score},
        "linkage": linkage,
        "utility": utility,
    }


def test_curves_run_from_small_epsilon_to_none() -> None:
    figure = epsilon_plot([point(None), point(8.0), point(0.5)])
    assert figure is not None
    area, rate, utility = figure.axes
    assert [label.get_text() for label in area.get_xticklabels()] == ["0.5*", "8", "∞ (none)"]
    assert "most that (ε, δ) allows (* in a simulation)" in {line.get_label() for line in area.lines}
    assert len(rate.containers) == 1
    assert {line.get_label() for line in utility.lines} == {"teacher, Hit@1", "teacher, NDCG@10"}


def test_the_table_of_the_curve_has_no_columns_of_a_branch_that_no_run_evaluated(run_dir: Path) -> None:
    one, other = point(1.0), point(2.0)
    for utility, branches in (
        ({}, []),
        (one["utility"], ["teacher"]),
        ({"student": one["utility"]["teacher"]}, ["student"]),
    ):
        (run_dir / "privacy_curve.json").write_text(json.dumps([one | {"utility": utility}, other | {"utility": {}}]))
        html = build_privacy_report(run_dir).read_text()
        head, body = html[html.index('id="curve"') :].split("<tbody>")[:2]
        assert [branch for branch in ("teacher", "student") if f"<th>{branch} Hit@1</th>" in head] == branches
        assert {row.count("<td") for row in body.split("</tbody>")[0].split("</tr>")[:-1]} == {head.count("<th>")}


def test_there_is_no_curve_of_one_epsilon_and_no_figure_of_nothing() -> None:
    assert epsilon_plot([point(1.0), point(1.0)]) is None
    assert rounds_plot([]) is None
    assert sigma_plot([]) is None
    figure = sigma_plot([point(None, 0.0), point(None, 0.1)])
    assert figure is not None
    assert figure.axes[0].get_ylim() == (0, 1.05)


def test_who_was_not_attacked_is_named_beside_who_was() -> None:
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    attack = {"domain": "a", "client": "a", "round": 1, "score": "loss", "auc": interval, "tpr": interval}
    attack |= {"members": 250, "others": 250}
    sent = [
        {"client": name, "direction": "up", "kind": kind}
        for name, kind in (("a", "teacher"), ("b", "teacher"), ("c", "semantics"))
    ]
    why = "Membership inference, b: it has 3 users."
    facts = {"attacks": {"membership": [attack], "not_run": [why]}, "communication": {"rows": sent}}
    sentences = words._persons(facts)
    assert len(sentences) == 2
    assert sentences[1] == f"b: not measured, though it sent weights computed from user behaviour. {why}"


@pytest.mark.parametrize(
    ("weaker", "stronger", "said"),
    [
        ((0.52, 0.47, 0.57), (0.30, 0.25, 0.35), "worse than guessing: taken the other way round"),
        ((0.52, 0.47, 0.57), (0.60, 0.55, 0.65), "better than guessing."),
        ((0.50, 0.45, 0.55), (0.48, 0.43, 0.53), "not told from guessing"),
    ],
)
def test_an_attack_that_is_wrong_too_often_tells_as_much_as_one_that_is_right(
    weaker: tuple[float, float, float], stronger: tuple[float, float, float], said: str
) -> None:
    def attack(score: str, figures: tuple[float, float, float]) -> dict[str, Any]:
        area = dict(zip(("value", "low", "high"), figures, strict=True))
        tried = {"domain": "a", "client": "a", "round": 1, "score": score, "auc": area, "tpr": area}
        sizes = dict.fromkeys(("members", "others", "trained", "untrained"), 250)  # of which these intervals are
        return {**tried, **sizes, "random_updates": [0.1, 0.55]}

    rows = [attack("loss", weaker), attack("calibrated", stronger)]
    facts = {"attacks": {"membership": rows, "not_run": []}, "communication": {"rows": []}}
    (persons,) = words._persons(facts)
    assert said in persons
    assert f"names the right one in {words._percent(stronger[0])} of cases" in persons
    (products,) = words._trained_products(rows)
    assert f"did not in {words._percent(stronger[0])} of cases" in products
    assert f"down to {words._percent(0.1)} by chance" in products  # further from a coin than .55
    assert ("Taken the other way round" in products) == (stronger[2] < 0.5)


def attacks(*figures: tuple[str, str, float, float], people: int = 250) -> dict[str, Any]:
    """Facts of attacks on persons: client, score, area, rate."""
    rows = [
        {"domain": "a", "client": client, "round": 1, "score": score, "auc": estimate(area), "tpr": estimate(rate)}
        | {"members": people, "others": people}
        for client, score, area, rate in figures
    ]
    return {"attacks": {"membership": rows, "not_run": []}, "communication": {"rows": []}}


def test_an_attack_that_finds_more_insiders_is_not_hidden_by_one_of_a_larger_area() -> None:
    (both,) = words._persons(attacks(("", "loss", 0.6, 0.25), ("a", "calibrated", 0.61, 0.01)))
    assert "strongest of 2 attacks tried (on its own update, by comparison with models" in both
    assert (
        "they find 1.0 % of the insiders; the attack that finds most of them (on the shared model that every organisation "
        "gets, by how well the model fits the person), 25.0 % (guessing: 1 %)."
    ) in both
    (one,) = words._persons(attacks(("", "loss", 0.6, 0.01), ("a", "calibrated", 0.61, 0.25)))
    assert "they find 25.0 % of the insiders (guessing: 1 %)." in one


def test_the_best_of_several_attacks_is_held_against_a_wider_interval() -> None:
    """The area .552 of 250 and 250 is above .5 at 95 %, and not at the 98.75 % that four attacks need."""
    low, _ = area_interval(0.552, 250, 250)
    assert low > 0.5
    best = ("a", "loss", 0.552, 0.01)
    (alone,) = words._persons(attacks(best))
    assert f"(between {words._percent(low)} and" in alone
    assert "at 95 %, as in the table" in alone
    assert "which is better than guessing" in alone
    rest = (("a", "calibrated", 0.5, 0.01), ("", "loss", 0.5, 0.01), ("", "calibrated", 0.5, 0.01))
    (of_four,) = words._persons(attacks(best, *rest))
    assert f"(between {words._percent(area_interval(0.552, 250, 250, z=2.4977)[0])} and" in of_four
    assert "at 95 % for the best of 4" in of_four
    assert "not told from guessing" in of_four
    weak = [
        {**row, "trained": 250, "untrained": 250, "random_updates": []}
        for row in attacks(best, *rest)["attacks"]["membership"]
    ]
    for row in weak:
        row["auc"] = estimate(1 - row["auc"]["value"])
    assert "other way round" in str(words._trained_products(weak[:1]))
    assert "other way round" not in str(words._trained_products(weak))
