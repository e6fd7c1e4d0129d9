"""What stands above and beside the tables of a grid."""

from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.grid.cells import all_cells
from lightning_sfubm.grid.command import results
from lightning_sfubm.grid.notes import table_notes
from lightning_sfubm.grid.plots import write_plots
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.grid.tables import markdown, ordered, seconds
from lightning_sfubm.methods import METHODS
from tests.grid.stand_ins import grid_file, stored


def cell(commit: str | None = "abc", candidates: int = 20, **hardware: Any) -> dict[str, Any]:
    return {"commit": commit, "num_candidates": candidates, "hardware": hardware or {"cpu": "X", "cores": 2}}


def test_columns_chance_commits_and_machines_are_told() -> None:
    text = "\n".join(table_notes([cell(), cell("def", threads=1, cpu="Y", gpus=["Z"])], "grids/g.yaml"))
    for words in (
        "± is the standard deviation",
        "list of 20 candidates a user; chance: Hit@1 0.050, NDCG@10 0.227.",
        "p (sign flips) is of Hit@1 over the same users and seeds, exact",
        "over all differences of the grid",
        "valid: share of answers that name exactly one candidate",
        "without what it builds on",
        "Commits of the cells: abc; def. Machines: X, 2 cores; Y, Z.",
        "`lightning-sfubm results --grid grids/g.yaml`",
    ):
        assert words in text


def test_many_commits_are_counted_and_unknown_ones_said() -> None:
    assert "Commits of the cells: c0; c1; c2; c3; c4; c5 and 2 more." in "\n".join(
        table_notes([cell(f"c{i}") for i in range(8)])
    )
    assert table_notes([{"num_candidates": 20}])[-1] == "Commits of the cells: not known. Machines: not known."
    assert table_notes([]) == []


def test_every_candidate_list_has_its_chance() -> None:
    levels = [note for note in table_notes([cell(), cell(candidates=100)]) if "chance" in note]
    assert ["Hit@1 0.050" in levels[0], "Hit@1 0.010" in levels[1]] == [True, True]


def test_the_figures_that_a_table_links_are_those_that_are_drawn(tmp_path: Path) -> None:
    stored(tmp_path, "stage1", [1, 0], domain="a, all users")
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    tables = ordered(grid, all_cells(tmp_path))
    drawn = write_plots(tables, tmp_path / "plots")
    for path in drawn:
        assert f"](plots/{path.name})" in markdown(grid, tables, [])
    assert len(drawn) == 2


def test_the_published_text_names_the_grid_but_no_folder_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path, "stage1", [1, 0])
    results(["--grid", str(tmp_path / "grid.yaml"), "--out", str(tmp_path), "--tables-only"])
    assert "--grid grid.yaml`" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path.parent)
    relative = f"{tmp_path.name}/grid.yaml"
    results(["--grid", relative, "--out", str(tmp_path), "--tables-only"])
    assert f"--grid {relative}`" in capsys.readouterr().out


def test_less_than_a_second_is_told_from_no_work() -> None:
    assert [seconds(value) for value in (None, 0.0, 0.2, 0.5, 61.4, 2062.0)] == ["–", "0", "<1", "<1", "61", "2,062"]
