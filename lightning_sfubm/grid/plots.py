"""Figures of a results grid: Hit@1 of every method, and quality beside cost."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from lightning_sfubm.evaluation.report_plots import COLOURS, STYLE
from lightning_sfubm.grid.cells import Json
from lightning_sfubm.grid.tables import plot_name, summary

_MARKERS = "osD^"  #: the next one where the colours are used up
_LABEL_SIZE = 6.5
_DIRECTIONS = ((1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7), (-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7))


def write_plots(tables: dict[tuple[str, str], dict[str, list[Json]]], folder: Path) -> list[Path]:
    """One PNG with Hit@1 and one with quality beside cost for each pair and domain."""
    written = []
    for (pair, domain), methods in tables.items():
        rows = [row for row in map(summary, methods.values()) if row["hit@1"] is not None]
        with matplotlib.rc_context(STYLE):
            for kind, figure in (("hit", hit_figure(domain, rows)), ("cost", cost_figure(domain, rows))):
                path = folder / plot_name(pair, domain, kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=110, bbox_inches="tight")
                written.append(path)
    return written


def hit_figure(domain: str, rows: list[Json]) -> Figure:
    """Hit@1 of every row with its interval.

    Args:
        domain: heading.
        rows: see :func:`lightning_sfubm.grid.tables.summary`.
    """
    styles = _styles(rows)
    figure, axes = _canvas(0.24 * len(rows) + 0.2, styles)
    for place, row in enumerate(reversed(rows)):
        low, high = row["hit@1 interval"]
        colour, marker = styles[row["group"]]
        axes.errorbar(row["hit@1"], place, xerr=[[max(0, row["hit@1"] - low)], [max(0, high - row["hit@1"])]],
                      fmt=marker, markersize=4, color=colour, linewidth=1.2)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"Hit@1{_among(rows)}: mean over seeds, with its 95 % interval over users")
    axes.set_title(domain)
    axes.set_xlim(left=0)
    return figure


def cost_figure(domain: str, rows: list[Json]) -> Figure:
    """Hit@1 of every row beside its cost. Points are numbered in the order of the rows; names stand beside the axes.

    Args:
        domain: heading.
        rows: see :func:`lightning_sfubm.grid.tables.summary`. Those whose training is not known whole (a resumed run has
            not seen all of it) are left out.
    """
    rows = [row for row in rows if row["train_cpu_s"] is not None]
    styles = _styles(rows)
    figure, axes = _canvas(max(4.0, 0.15 * len(rows) + 0.1), styles)
    points = [(max(1.0, row["train_cpu_s"] + (row["cpu_s"] or 0.0)), row["hit@1"]) for row in rows]
    names = []
    for number, (row, (cost, quality)) in enumerate(zip(rows, points, strict=True), 1):
        colour, marker = styles[row["group"]]
        axes.plot(cost, quality, marker, color=colour, markersize=4)
        names.append(
            Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=0, label=f"{number}  {row['label']}")
        )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if high < 10 * low:  # no two powers of ten to go by
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("CPU seconds of training and ranking, without what the row builds on (below 1 shown as 1)")
    axes.set_ylabel(f"Hit@1{_among(rows)}")
    axes.set_title(f"{domain}: quality beside cost")
    if names:
        axes.legend(handles=names, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=_LABEL_SIZE, labelspacing=0.35,
                    handletextpad=0.1, borderaxespad=0)  # fmt: skip
    _number(axes, points, [styles[row["group"]][0] for row in rows])
    return figure


def _among(rows: list[Json]) -> str:
    sizes = sorted({row["num_candidates"] for row in rows})
    return f" among {' or '.join(map(str, sizes))} candidates" if sizes else ""


def _styles(rows: list[Json]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each group."""
    groups = dict.fromkeys(row["group"] for row in rows)
    return {
        group: (COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % len(_MARKERS)])
        for i, group in enumerate(groups)
    }


def _canvas(height: float, styles: dict[str, tuple[str, str]]) -> tuple[Figure, Axes]:
    """Axes of that height in inches, with the groups named below them."""
    bottom, top = 0.55, 0.3
    figure = Figure(figsize=(7, height + bottom + top))
    axes = figure.subplots()
    figure.subplots_adjust(
        left=0.1, right=0.98, bottom=bottom / (height + bottom + top), top=1 - top / (height + bottom + top)
    )
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=0, label=group)
        for group, (colour, marker) in styles.items()
        if group
    ]
    if handles:
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(handles)))
    return figure, axes


def _number(axes: Axes, points: list[tuple[float, float]], colours: list[str]) -> None:
    """Number the points from 1; a number that would lie on a point or on another number stands off, on a line.

    Where no place is free, it stands right of its point.
    """
    axes.autoscale_view()  # places on the page are asked for below
    scale = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    dots = [tuple(axes.transData.transform(point)) for point in points]
    taken = [Bbox.from_bounds(x - 2.5 * scale, y - 2.5 * scale, 5 * scale, 5 * scale) for x, y in dots]
    steps = [(r * x, r * y) for r in range(7, 400, 5) for x, y in _DIRECTIONS]
    for number, ((x, y), point, colour) in enumerate(zip(dots, points, colours, strict=True), 1):
        width, height = 0.75 * len(str(number)) * _LABEL_SIZE * scale, 1.25 * _LABEL_SIZE * scale
        boxes = [
            (step, Bbox.from_bounds(x + step[0] * scale - width / 2, y + step[1] * scale - height / 2, width, height))
            for step in steps
        ]
        free = ((step, box) for step, box in boxes if axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
        step, box = next(((step, box) for step, box in free if not box.count_overlaps(taken)), boxes[0])
        taken.append(box)
        away = step[0] ** 2 + step[1] ** 2 > 100
        axes.annotate(
            str(number),
            point,
            xytext=step,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL_SIZE,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 3, "shrinkB": 2}
            if away
            else None,
        )
