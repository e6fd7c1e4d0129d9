"""Figures of a results grid: Hit@1 of every method, and quality beside cost."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lightning_sfubm.evaluation.report_plots import COLOURS, STYLE
from lightning_sfubm.grid.cells import Json
from lightning_sfubm.grid.tables import summary


def write_plots(tables: dict[tuple[str, str], dict[str, list[Json]]], folder: Path) -> list[Path]:
    """One PNG with Hit@1 and one with quality beside cost for each pair and domain."""
    written = []
    for (pair, domain), methods in tables.items():
        rows = [row for row in map(summary, methods.values()) if row["hit@1"] is not None]
        stem = f"{pair}_{domain}".replace(", ", "_").replace(" ", "_")
        with matplotlib.rc_context(STYLE):
            for kind, figure in (("hit", _hits(domain, rows)), ("cost", _cost(domain, rows))):
                path = folder / f"{stem}_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=110, bbox_inches="tight")
                written.append(path)
    return written


def _groups(rows: list[Json]) -> dict[str, str]:
    return {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(row["group"] for row in rows))}


def _hits(domain: str, rows: list[Json]) -> Figure:
    figure = Figure(figsize=(7, 0.8 + 0.24 * len(rows)))
    axes = figure.subplots()
    colours = _groups(rows)
    for place, row in enumerate(reversed(rows)):
        low, high = row["hit@1 interval"]
        axes.errorbar(row["hit@1"], place, xerr=[[max(0, row["hit@1"] - low)], [max(0, high - row["hit@1"])]],
                      fmt="o", markersize=4, color=colours[row["group"]], linewidth=1.2)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("Hit@1 among 20 candidates: mean over seeds, 95 % interval over users of the first seed")
    axes.set_title(domain)
    axes.set_xlim(left=0)
    return figure


def _cost(domain: str, rows: list[Json]) -> Figure:
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    colours = _groups(rows)
    for row in rows:
        if row["train_cpu_s"] is None:  # a resumed run has not seen all of its training
            continue
        cost = max(1.0, row["train_cpu_s"] + (row["cpu_s"] or 0.0))
        axes.plot(cost, row["hit@1"], "o", color=colours[row["group"]], markersize=4)
        axes.annotate(row["label"], (cost, row["hit@1"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds of training and ranking, without what the row builds on (below 1 shown as 1)")
    axes.set_ylabel("Hit@1 among 20 candidates")
    axes.set_title(f"{domain}: quality beside cost")
    return figure
