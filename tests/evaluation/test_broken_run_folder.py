"""``lightning-sfubm report`` on a run folder whose files were edited: a report that says so, and none that looks better."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.__main__ import main
from lightning_sfubm.audit.curve import curve_points
from lightning_sfubm.errors import DataError
from lightning_sfubm.federated.ledger import Ledger

ESTIMATE = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 10}
FIGURES = {"sigma": 0.1, "cosine_mean": 0.5, "linkage_with_replacement": 0.5, "used": True}
MEMBER = {"domain": "a", "client": "", "round": 1, "score": "loss", "auc": ESTIMATE, "tpr": ESTIMATE}
MEMBER |= {"chance": {"auc": 0.5, "tpr": 0.01}, "limit": None, "epsilon": None, "members": 5, "others": 5}
POINT: dict[str, Any] = {"domain": "a", "epsilon": 1.0, "sigma": 0.1, "membership": {}, "linkage": None, "utility": {}}
HUGE = 10**400


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a whole ledger of two messages, without a guarantee, and a checkpoint that counts them."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.start()
    vectors: dict[str, dict[str, object]] = {"vectors": {"shape": [7, 4], "dtype": "float32"}}
    ledger.record_bytes("a", "up", "semantics", 0, b"12345", {"mechanism": "noise", "sigma": 0.05}, vectors)
    ledger.record_bytes("a", "up", "teacher", 1, b"123", {})
    (tmp_path / "run.json").write_text(json.dumps({"title": "T", "domains": ["a"]}))
    state = tmp_path / "checkpoints/state-0001"
    state.mkdir(parents=True)
    (state / "loop.json").write_text(json.dumps({"stored": {"ledger": 2}}))
    return tmp_path


def reported(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Facts of both reports, and their pages."""
    main(["report", str(run_dir)])
    facts = [json.loads((run_dir / f"{name}.json").read_text()) for name in ("report", "privacy_report")]
    pages = "".join((run_dir / f"{name}.html").read_text() for name in ("report", "privacy_report"))
    return facts[0], facts[1], " ".join(pages.split())


def test_a_whole_folder_has_no_problems(run_dir: Path) -> None:
    (run_dir / "privacy.json").write_text(json.dumps({"a": [FIGURES]}))
    (run_dir / "audit.json").write_text(json.dumps({"check": None, "membership": [MEMBER], "not_run": ["x"]}))
    (run_dir / "privacy_curve.json").write_text(json.dumps([POINT]))
    (run_dir / "history.jsonl").write_text(
        '{"client": "a", "metrics": {"x": 1.0}, "round": null, "phase": "teacher"}\n'
    )
    report, privacy, _ = reported(run_dir)
    assert report["problems"] == privacy["problems"] == []
    assert privacy["self_check"]["holds"] is True
    assert privacy["guarantee"]["standing"] == "none"
    assert (len(privacy["attacks"]["membership"]), len(privacy["curve"])) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": "x"},
        {"bytes": HUGE},
        {"client": [1]},
        {"kind": 5},
        {"direction": None},
        {"round": "1"},
        {"tensors": []},
        {"mechanism": "noise"},
        {"mechanism": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}},
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_malformed_line_of_the_ledger_is_told_and_makes_nothing_better(
    run_dir: Path, change: dict[str, Any], place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "ledger.jsonl"
    lines = path.read_text().splitlines()
    lines[place] = json.dumps(json.loads(lines[place]) | change, sort_keys=True)
    path.write_text("\n".join(lines) + "\n")
    report, privacy, pages = reported(run_dir)
    words = (
        f"{path}: line {place + 1} is not an entry of a ledger and left out: the ledger cannot be checked to its end"
    )
    assert any(problem.startswith(words) for problem in report["problems"])
    assert any(problem.startswith(words) for problem in privacy["problems"])
    assert pages.count("1 line of ledger.jsonl cannot be read") == 1
    assert report["communication"]["messages"] == 1
    check = privacy["self_check"]
    assert check["holds"] is False
    assert [row["holds"] for row in check["rows"][:3]] == [False] * 3
    assert privacy["guarantee"]["standing"] in ("none", "unknown")
    assert "There may be more: 1 line of the ledger cannot be read." in privacy["in_plain_words"][0]["answer"]


@pytest.mark.parametrize("content", [b'{"bytes": "x"}\n{}\n', b"\xff\xfe\n\x80\n", b"5\n[]\n"])
def test_a_ledger_without_a_readable_line_is_not_called_empty(run_dir: Path, content: bytes) -> None:
    (run_dir / "ledger.jsonl").write_bytes(content)
    _, privacy, pages = reported(run_dir)
    assert privacy["in_plain_words"][0]["answer"] == ["This is not known: 2 lines of the ledger cannot be read."]
    assert privacy["self_check"]["holds"] is False
    assert [row["holds"] for row in privacy["self_check"]["rows"][:3]] == [False] * 3
    assert privacy["guarantee"]["standing"] == "unknown"
    for words in (
        "No federated messages were recorded",
        "Nothing: ",
        "No client sent anything",
        "No item vectors were",
    ):
        assert words not in pages


@pytest.mark.parametrize("tensor", [5, [1], {"shape": 5}, {"shape": [[1], "x"], "dtype": {}}])
def test_tensors_of_another_form_are_told_as_they_stand(run_dir: Path, tensor: Any) -> None:
    ledger = Ledger(run_dir / "ledger.jsonl")
    ledger.resume(2)
    ledger.record_bytes("a", "up", "teacher", 2, b"1", {"sigma": [], "mechanism": 5}, {"w": tensor})
    report, _, _ = reported(run_dir)
    assert any(tensors.startswith("w") for row in report["communication"]["rows"] for tensors in row["tensors"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("audit.json", {"check": 3}, "check is no object"),
        ("audit.json", {"check": {"head": "x"}}, "check.problems is missing"),
        ("audit.json", [1], "the content is no object"),
        ("audit.json", {"membership": {}}, "membership is no list"),
        ("audit.json", {"membership": [MEMBER | {"auc": None}]}, "membership[0].auc is no object"),
        ("audit.json", {"membership": [MEMBER | {"score": "x"}]}, "membership[0].score is none of loss, calibrated"),
        ("audit.json", {"membership": [MEMBER | {"members": 0}]}, "membership[0].members is not between 1 and"),
        ("audit.json", {"membership": [MEMBER | {"auc": ESTIMATE | {"value": 5}}]}, "auc.value is not between 0 and 1"),
        ("audit.json", {"membership": [{"domain": "a"}]}, "membership[0].client is missing"),
        ("audit.json", {"linkage": [{"client": "a"}]}, "linkage[0].attacked is missing"),
        ("audit.json", {"items": [5]}, "items[0] is no object"),
        ("audit.json", {"not_run": [5]}, "not_run[0] is no text"),
        ("privacy_curve.json", {"a": 1}, "is no list"),
        ("privacy_curve.json", [POINT | {"membership": {"loss": {}}}], "[0].membership.loss.auc is missing"),
        ("privacy_curve.json", [POINT | {"utility": {"teacher": {"hit@1": ESTIMATE}}}], "teacher.ndcg@10 is missing"),
    ],
)
def test_an_audit_of_another_form_is_left_out_by_name(run_dir: Path, name: str, content: Any, words: str) -> None:
    (run_dir / name).write_text(json.dumps(content))
    _, privacy, _ = reported(run_dir)
    (problem,) = privacy["problems"]
    assert str(run_dir / name) in problem
    assert words in problem
    assert problem.endswith("left out. Run 'lightning-sfubm audit' again.")
    assert privacy["audit"] is None
    if name == "audit.json":
        assert privacy["self_check"]["rows"][-1]["detail"] == "audit.json does not say it, or cannot be used"
        with pytest.raises(DataError, match=r"no readable audit\.json there .*run 'lightning-sfubm audit' on it first"):
            curve_points([run_dir])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("privacy.json", {"a": [{"cosine_mean": 0.5}]}, "a[0].sigma is missing; 'a' is left out"),
        ("privacy.json", {"a": [{"sigma": "x"}]}, "a[0].sigma is no finite number"),
        ("privacy.json", {"a": 5}, "a is no list"),
        ("privacy.json", {"a": [5]}, "a[0] is no object"),
        ("privacy.json", {"a": [FIGURES | {"averaging": 5}]}, "a[0].averaging is no object"),
        ("privacy.json", {"a": [FIGURES | {"averaging": {"uploads": [1], "linkage": []}}]}, "as many entries"),
        ("privacy.json", {"a": [FIGURES | {"cosine_mean": HUGE}]}, "a number of too many digits"),
        ("run.json", {"domains": 5}, "domains is no list; 'domains' is left out"),
        ("run.json", {"comparisons": [5]}, "comparisons[0] is no object"),
        ("run.json", {"comparisons": [{"a": "x"}]}, "comparisons[0].b is missing"),
        ("run.json", {"reference_method": []}, "reference_method is no text"),
        ("run.json", {"timings": {"training": 5}}, "timings.training is no object"),
        ("run.json", {"protocol": "x"}, "protocol is no object"),
        ("run.json", {"notes": 5}, "notes is no list"),
        ("history.jsonl", {"client": 5, "metrics": {}}, "client is no text"),
        ("history.jsonl", {"client": "a", "metrics": 5}, "metrics is no object"),
        ("history.jsonl", {"client": "a", "metrics": {}, "round": [1]}, "round is no whole number"),
        ("data/a.json", [1], "expected a JSON object, found list"),
    ],
)
def test_a_file_of_another_form_is_named_and_the_rest_is_used(
    run_dir: Path, name: str, content: Any, words: str
) -> None:
    path = run_dir / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) + "\n")
    report, privacy, _ = reported(run_dir)
    (problem,) = report["problems"]
    assert problem.startswith(f"{path}: ")
    assert words in problem
    assert report["communication"]["messages"] == 2
    assert privacy["self_check"]["holds"] is True
