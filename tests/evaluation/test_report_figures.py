"""Figures and groups of the report: what is drawn, and that it can be read."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from lightning_sfubm.evaluation.facts import run_facts
from lightning_sfubm.evaluation.report import render_html
from lightning_sfubm.evaluation.report_plots import figures, learning_curves, timings_plot
from lightning_sfubm.evaluation.run_folder import RunFolder
from lightning_sfubm.evaluation.terminal import print_results

from .conftest import make_result


def history(*stretches):
    """Lines of two clients: phase, round and number of epochs of each stretch."""
    epochs = [(phase, round_) for phase, round_, count in stretches for _ in range(count)]
    metrics = {f"train/loss_{i}": 1.0 for i in range(3)}
    return [
        {"client": client, "phase": phase, "round": round_, "metrics": metrics | {"val/ndcg@10": 0.1 * i}}
        for client in ("action", "drama")
        for i, (phase, round_) in enumerate(epochs)
    ]


def test_learning_curves_show_each_client_over_its_epochs(fake_run):
    facts = run_facts(RunFolder.read(fake_run))
    quality, loss = figures(facts)["curves"].axes[:2]
    expected = [line["metrics"]["val/ndcg@10"] for line in facts["history"] if line["client"] == "action films"]
    drawn = quality.lines[0].get_ydata()
    assert np.flatnonzero(np.isnan(drawn)).tolist() == [5]  # between the teacher's epochs and the student's
    assert np.allclose(drawn[np.isfinite(drawn)], expected)
    epochs = quality.lines[0].get_xdata()
    assert epochs[np.isfinite(epochs)].tolist() == list(range(1, 14))
    assert {text.get_text() for text in loss.texts} >= {"teacher (5 rounds)", "local student"}


@pytest.mark.parametrize(
    "stretches",
    [
        [("teacher", 1, 1), ("teacher", None, 1), ("student", None, 1)],
        [("teacher", 1, 2), ("teacher", None, 30), ("student", None, 20)],
        [("teacher", 1, 50), ("student", None, 1)],
        [("one", 1, 1), ("two", 1, 1), ("one", 2, 1), ("two", 2, 1), ("two", None, 1)],
    ],
)
def test_names_of_phases_never_lie_over_each_other(stretches):
    figure = learning_curves(history(*stretches))
    figure.draw_without_rendering()
    for quality, loss in (figure.axes[:2], figure.axes[2:]):
        names = [text for panel in (quality, loss) for text in panel.texts]
        assert len(names) == 2 * len(stretches)
        boxes = [Text.get_window_extent(name) for name in names]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert Text.get_window_extent(quality._left_title).y0 > max(box.y1 for box in boxes)


def test_ticks_of_the_timings_are_where_they_say(fake_run):
    panel = timings_plot({"training": {"wall_s": 11.0, "cpu_s": 9.0}}).axes[0]
    panel.figure.draw_without_rendering()
    told = {float(label.get_text()): label.get_position()[0] for label in panel.get_xticklabels()}
    assert len(told) > 3
    assert list(told) == pytest.approx(list(told.values()))
    assert panel.xaxis.get_major_formatter()(1500.0, None) == "1,500"


def test_each_group_has_one_heading_in_the_order_of_first_appearance(tmp_path):
    rows = (("fusion", "Controls"), ("stage1", "Ours"), ("pooled", "Controls"), ("llm", "LLM"), ("twice", "Ours"))
    for order, (method, group) in enumerate(rows):
        make_result(method, users=20, label=f"row {method}", group=group, order=order).save(
            tmp_path / "results" / "films" / f"{method}.parquet"
        )
    facts = run_facts(RunFolder.read(tmp_path))
    ordered = ["fusion", "pooled", "stage1", "twice", "llm"]
    assert [row["method"] for row in facts["domains"][0]["rows"]] == ordered
    html = render_html(facts, {})
    assert [html.count(f">{group}</td>") for group in ("Controls", "Ours", "LLM")] == [1, 1, 1]
    console = Console(record=True, width=120)
    print_results(tmp_path, console)
    text = console.export_text()
    assert sorted(ordered, key=lambda method: text.index(f"row {method}")) == ordered
