"""The check that published stage-1 rows still hold: what it compares, and that it can fail."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "stage1_rows", raising=False)
    return importlib.import_module("stage1_rows")


def cell(hit: float, domain: str = "a, all users", lists: str = "x", **other: Any) -> dict[str, Any]:
    estimate = {"value": hit, "low": hit - 0.01, "high": hit + 0.01}
    facts = {"domain": domain, "method": "m", "seed": 1, "label": "M", "candidate_hash": lists, "train_cpu_s": 1.0}
    return facts | {"metrics": {"hit@1": estimate}} | other


def test_a_row_outside_the_published_interval_is_told(rows: ModuleType) -> None:
    assert [row["inside"] for row in rows.compare([cell(0.305)], [cell(0.3)])] == [True]
    assert [row["inside"] for row in rows.compare([cell(0.289)], [cell(0.3)])] == [False]


def test_only_rows_that_both_have_of_all_users_are_compared(rows: ModuleType) -> None:
    published = [cell(0.3), cell(0.3, "a")]
    assert rows.compare([cell(0.3, seed=2), cell(0.3, method="other"), cell(0.3, "a")], published) == []


def test_other_candidate_lists_are_refused(rows: ModuleType) -> None:
    with pytest.raises(SystemExit, match="other candidate lists"):
        rows.compare([cell(0.3, lists="y")], [cell(0.3)])


def test_the_command_ends_with_an_error_where_a_row_does_not_hold(
    rows: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "rows.json")
    monkeypatch.setattr(sys, "argv", ["stage1_rows.py", "--out", "again"])
    for value, code in ((0.3, None), (0.35, 1)):
        again = [cell(value)]
        monkeypatch.setattr(
            rows, "all_cells", lambda folder, again=again: again if folder == Path("again") else [cell(0.3)]
        )
        if code is None:
            rows.main()
        else:
            with pytest.raises(SystemExit) as ended:
                rows.main()
            assert ended.value.code == code
        assert (tmp_path / "rows.json").is_file()
