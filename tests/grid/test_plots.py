"""Figures of a grid: what they show can be read, and stands where the table says."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from lightning_sfubm.evaluation.significance import wilson_interval
from lightning_sfubm.grid.cells import Json, read_cell
from lightning_sfubm.grid.plots import cost_figure, hit_figure
from lightning_sfubm.grid.tables import summary
from tests.grid.stand_ins import stored


def row(number: int, cost: float = 100.0, hit: float = 0.4, **changes: Any) -> Json:
    return {
        "label": f"A method with a long name, number {number}",
        "group": f"group {number % 9}",
        "hit@1": hit,
        "hit@1 interval": [hit - 0.1, hit + 0.1],
        "train_cpu_s": cost,
        "cpu_s": 1.0,
        "num_candidates": 20,
    } | changes


def test_the_interval_of_several_seeds_is_about_their_mean(tmp_path: Path) -> None:
    cells = [read_cell(stored(tmp_path, "stage1", hits, seed=s)) for s, hits in ((1, [1, 1, 1, 1]), (2, [1, 0, 0, 0]))]
    of_both = summary([cell for cell in cells if cell is not None])
    expected = wilson_interval(2.5, 4)
    assert of_both["hit@1 interval"] == pytest.approx([expected.low, expected.high])
    assert of_both["hit@1 interval"][1] < 1  # the first seed's ends there
    for cell in filter(None, cells):  # of one seed it stays that of the cell
        estimate = cell["metrics"]["hit@1"]
        assert summary([cell])["hit@1 interval"] == pytest.approx([estimate["low"], estimate["high"]])


def test_points_of_the_cost_plot_are_numbered_apart_and_named_beside_it() -> None:
    rows = [row(i, 100 + i % 3, 0.4 + 0.001 * (i % 5)) for i in range(1, 31)]
    rows += [row(31, 1000.0, 0.1), row(32, train_cpu_s=None)]
    figure = cost_figure("films", rows)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    numbers = {text.get_text(): text for text in axes.texts}
    assert list(numbers) == [str(number) for number in range(1, 32)]
    boxes = [Text.get_window_extent(text) for text in numbers.values()]  # without the lines to the points
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{i}  {r['label']}" for i, r in enumerate(rows[:31], 1)
    ]
    assert legend.get_window_extent().x0 > axes.bbox.x1


@pytest.mark.parametrize(
    ("costs", "ticks"),
    [((1.0, 1.05), {"1", "1.05"}), ((300.0, 350.0), {"300", "350"}), ((2.0, 4000.0), {"10", "1,000"})],
)
def test_costs_are_told_in_plain_numbers(costs: tuple[float, ...], ticks: set[str]) -> None:
    figure = cost_figure("films", [row(i, cost, cpu_s=None) for i, cost in enumerate(costs)])
    figure.draw_without_rendering()
    labels = {label.get_text() for which in ("major", "minor") for label in figure.axes[0].get_xticklabels(which=which)}
    assert labels >= ticks
    assert not any("times" in label or "^" in label for label in labels)


def test_groups_are_told_apart_beyond_the_colours() -> None:
    figure = hit_figure("films", [row(i) for i in range(1, 10)])
    (legend,) = figure.legends
    styles = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    assert len(styles) == len(legend.get_texts()) == 9
    assert figure.axes[0].get_xlabel().startswith("Hit@1 among 20 candidates: mean over seeds")


def test_a_domain_without_rows_is_drawn_empty() -> None:
    for draw in (hit_figure, cost_figure):
        figure = draw("films", [])
        figure.draw_without_rendering()
        assert not figure.axes[0].lines
