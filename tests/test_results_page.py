"""The tables of the results page are those of the published cells."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.grid.cells import all_cells
from lightning_sfubm.grid.comparisons import comparisons
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.grid.tables import ordered
from lightning_sfubm.methods import METHODS
from tests.grid.stand_ins import grid_file, stored

SCRIPT = Path(__file__).parents[1] / "docs" / "results" / "page.py"


def test_the_page_says_what_the_cells_say() -> None:
    checked = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    for page, tables in (("results.md", 6), ("joining.md", 3)):  # the check is of marked tables alone
        assert (SCRIPT.parents[1] / page).read_text(encoding="utf-8").count("<!-- table: ") >= tables


def page_of(folder: Path) -> Any:
    """The script, freshly imported, of a page whose one pair is published below ``folder``."""
    spec = importlib.util.spec_from_file_location("results_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    page: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    page.HERE = folder / "docs" / "results"
    return page


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two rows of a pair with their difference, and the grid they are of."""
    out = tmp_path / "docs" / "results" / "p"
    out.mkdir(parents=True)
    stored(out, "popularity", [0, 0, 1, 0])
    stored(out, "stage1", [1, 1, 1, 0])
    (tmp_path / "configs" / "results").mkdir(parents=True)
    grid = tmp_path / "configs" / "results" / "p.yaml"
    grid.write_text(grid_file(out).read_text())
    chosen = load_grid(grid, set(METHODS))
    (out / "comparisons.json").write_text(json.dumps(comparisons(chosen, ordered(chosen, all_cells(out)))))
    return tmp_path


def shown(folder: Path) -> tuple[str, str]:
    """What the page says of a row and of its difference to the other one."""
    page = page_of(folder)
    return page.mean("p", "a", "stage1", "hit@1", 3), page.difference("p", "stage1", "popularity", "a")


def test_a_difference_goes_with_the_cells_it_was_made_from(published: Path) -> None:
    mean, difference = shown(published)
    assert mean == ".750"
    assert difference.startswith("+.500 [")
    out = published / "docs" / "results" / "p"
    (out / "base.yaml").write_text("seed_everything: 1\ndata: {init_args: {seed: 2}}\n")
    assert shown(published) == ("–", "–")  # the grid has other settings now than both


def test_a_difference_goes_when_one_of_its_cells_is_replaced(published: Path) -> None:
    stored(published / "docs" / "results" / "p", "stage1", [1, 0, 1, 0])
    assert shown(published) == (".500", "–")


@pytest.mark.parametrize(
    ("p", "approximate", "words"),
    [(0.0321, False, "p 0.032"), (0.0321, True, "p ≈ 0.032"), (1.0, True, "p 1"), (2e-9, True, "p < 1e-6")],
)
def test_a_corrected_p_says_how_far_it_is_known(p: float, approximate: bool, words: str) -> None:
    assert page_of(Path()).corrected({"p_holm": p, "p_approximate": approximate}) == words


def test_a_difference_is_bold_where_it_stands_after_correction() -> None:
    fact = {"difference": 0.013, "low": 0.007, "high": 0.02, "p_holm": 0.049}
    page = page_of(Path())
    assert page.bold_where_it_stands(fact) == "**+.013 [+.007, +.020]**"
    assert page.bold_where_it_stands({**fact, "p_holm": 0.05}) == "+.013 [+.007, +.020]"
