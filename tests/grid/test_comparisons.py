"""Paired differences in full-catalogue ranking, beside those in Hit@1."""

from pathlib import Path

import pytest

from lightning_sfubm.grid.cells import all_cells
from lightning_sfubm.grid.comparisons import comparisons
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.grid.tables import markdown, ordered
from lightning_sfubm.methods import METHODS
from tests.grid.stand_ins import grid_file, stored


def test_a_difference_in_full_ranking_is_a_mean_over_users_and_seeds(tmp_path: Path) -> None:
    """The stand-ins rank a hit first (gain 1) and any other target third (gain 1/2), in the catalogue too."""
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    for seed, hits in ((1, [1, 1, 1, 0]), (2, [1, 0, 1, 0])):
        stored(tmp_path, "popularity", [0, 0, 1, 0], seed=seed)
        stored(tmp_path, "stage1", hits, seed=seed)
    tables = ordered(grid, all_cells(tmp_path))
    (fact,) = comparisons(grid, tables)
    assert fact["difference"] == pytest.approx(0.375)
    assert fact["full_difference"] == pytest.approx(0.1875)  # .25 and .125
    assert fact["full_low"] <= 0.1875 <= fact["full_high"]
    assert fact["full_low"] == pytest.approx(fact["low"] / 2)  # the same resamples, half the gain
    assert "| +0.1875 [" in markdown(grid, tables, [fact])


def test_where_one_row_ranks_candidates_only_full_ranking_is_not_compared(tmp_path: Path) -> None:
    """Nor in the pooled difference, whose other domain alone would stand for both."""
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    for domain in ("a", "b"):
        stored(tmp_path, "popularity", [0, 0, 1, 0], domain=domain, catalogue=domain == "b")
        stored(tmp_path, "stage1", [1, 1, 1, 0], domain=domain)
    tables = ordered(grid, all_cells(tmp_path))
    facts = {fact["domain"]: fact for fact in comparisons(grid, tables)}
    assert facts["a"]["full_difference"] is facts["a"]["full_low"] is facts["pooled"]["full_difference"] is None
    assert facts["b"]["full_difference"] == pytest.approx(0.25)
    assert [facts[name]["difference"] for name in ("a", "b", "pooled")] == pytest.approx([0.5] * 3)
    lines = markdown(grid, tables, list(facts.values())).splitlines()
    assert [line.split(" | ")[6] for line in lines if "Stage1 − Popularity" in line][::2] == ["–", "–"]


def test_users_at_hand_come_before_a_published_difference_of_as_many_seeds(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    stored(tmp_path, "popularity", [0, 0, 1, 0])
    stored(tmp_path, "stage1", [1, 1, 1, 0])
    tables = ordered(grid, all_cells(tmp_path))
    facts = comparisons(grid, tables)
    published = [{**fact, "low": -1.0, "p_flip": 0.01} for fact in facts]
    assert comparisons(grid, tables, published) == facts


def test_users_that_lack_a_seed_are_not_compared(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    for seed, users in ((1, 4), (2, 3)):
        stored(tmp_path, "popularity", [0, 0, 1, 0][:users], seed=seed)
        stored(tmp_path, "stage1", [1, 1, 1, 1][:users], seed=seed)
    (fact,) = comparisons(grid, ordered(grid, all_cells(tmp_path)))
    assert (fact["users"], fact["seeds"]) == (3, 2)
    assert fact["difference"] == pytest.approx(2 / 3)


def test_the_test_of_several_seeds_uses_all_of_them(tmp_path: Path) -> None:
    """Users that a alone hits with the first seed and b alone with the second tell nothing; those of the first seed would."""
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    for seed, a, b in ((1, [1, 1, 1, 1], [0, 0, 0, 0]), (2, [0, 0, 0, 1], [1, 1, 1, 0])):
        stored(tmp_path, "popularity", b, seed=seed)
        stored(tmp_path, "stage1", a, seed=seed)
    (fact,) = comparisons(grid, ordered(grid, all_cells(tmp_path)))
    assert (fact["seeds"], fact["p_flip"], fact["p_holm"]) == (2, 1.0, 1.0)


def test_a_published_p_that_is_approximate_is_marked(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    stored(tmp_path, "popularity", [0, 0, 1, 0])
    stored(tmp_path, "stage1", [1, 1, 1, 0])
    tables = ordered(grid, all_cells(tmp_path))
    (fact,) = comparisons(grid, tables)
    assert "| 0.5 | 0.5 |" in markdown(grid, tables, [fact])
    assert "| ≈ 0.5 | 0.5 |" in markdown(grid, tables, [{**fact, "p_approximate": True}])
