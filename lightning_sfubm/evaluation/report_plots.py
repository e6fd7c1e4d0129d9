"""The figures of the report. Pure functions from facts to matplotlib figures; no global state, no display needed."""

import base64
import io
from collections import Counter
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_sfubm.evaluation.run_folder import Json

# Okabe and Ito's palette: told apart with any colour vision and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#6b7280"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "lightning-sfubm",
}
MAX_LINES = 6  #: curves in one panel
_NAME_HEIGHT = 10  #: points from one line of phase names to the next


def figures(facts: Json) -> dict[str, Figure]:
    """All figures for which there are data.

    Args:
        facts: see :func:`lightning_sfubm.evaluation.facts.run_facts`.

    Returns:
        Figures by name, out of ``hit``, ``curves``, ``cosine``, ``linkage`` and ``timings``.
    """
    with matplotlib.rc_context(STYLE):
        drawn: dict[str, Figure | None] = {
            "hit": hit_plot(facts["domains"]),
            "curves": learning_curves(facts["history"]),
            "cosine": cosine_plot(facts["privacy"]),
            "linkage": linkage_plot(facts["privacy"]),
            "timings": timings_plot(facts["run"].get("timings") or {}),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def svg_uri(figure: Figure) -> str:
    """The figure as a data URI, byte-equal for equal figures."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def hit_plot(domains: list[Json]) -> Figure | None:
    """Hit@1 of every method with its 95 % interval, one panel a domain."""
    domains = [domain for domain in domains if domain["rows"]]
    if not domains:
        return None
    groups = list(dict.fromkeys(row["group"] for domain in domains for row in domain["rows"]))
    colour = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    pairs = [domains[i : i + 2] for i in range(0, len(domains), 2)]  # two panels a row share their methods
    labels = [{row["method"]: row["label"] for domain in pair for row in domain["rows"]} for pair in pairs]
    heights = [0.27 * len(rows) + 0.8 for rows in labels]
    figure = Figure(figsize=(2.3 + 3.1 * len(pairs[0]), 0.4 + sum(heights)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(pairs), len(pairs[0]), sharey="row", squeeze=False, height_ratios=heights)
    for panels, pair, rows in zip(grid, pairs, labels, strict=True):
        for panel, domain in zip(panels, pair, strict=False):
            _hits(panel, domain, list(rows), colour)
        panels[0].set_yticks(range(len(rows)), list(rows.values()))
    if len(domains) > 1 and len(domains) % 2:
        grid[-1, -1].set_axis_off()
    handles = [matplotlib.lines.Line2D([], [], color=colour[g], marker="o", markersize=5, label=g) for g in groups if g]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def _hits(panel: Axes, domain: Json, methods: list[str], colour: dict[str, str]) -> None:
    for row in domain["rows"]:
        estimate, y = row["metrics"]["hit@1"], methods.index(row["method"])
        if estimate["value"] is None:
            continue
        panel.plot([estimate["low"], estimate["high"]], [y, y], color=colour[row["group"]], linewidth=2, alpha=0.6)
        panel.plot(estimate["value"], y, "o", color=colour[row["group"]], markersize=5)
    if domain["chance"]["hit@1"]:
        panel.axvline(domain["chance"]["hit@1"], color=GREY, linestyle="--", linewidth=1)
        panel.annotate(
            "chance",
            (domain["chance"]["hit@1"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
            va="top",
        )
    panel.set_title(domain["name"])
    panel.set_xlabel(f"Hit@1 among {domain['num_candidates']} candidates")
    panel.set_xlim(left=0)
    panel.set_ylim(len(methods) - 0.4, -1.0)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", length=0)


def learning_curves(history: list[Json]) -> Figure | None:
    """Validation metric and losses per client over its epochs; phases are shaded and named."""
    clients = list(dict.fromkeys(line["client"] for line in history))
    if not clients:
        return None
    figure = Figure(figsize=(9, 0.4 + 2.5 * len(clients)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr, call-arg]
    names: list[list[Annotation]] = []
    panels = figure.subplots(len(clients), 2, squeeze=False)
    for client, (quality, loss) in zip(clients, panels, strict=True):
        lines = [line for line in history if line["client"] == client]
        _curves(quality, lines, _quality_names(lines), "validation metric")
        _curves(loss, lines, _loss_names(lines), "training loss")
        names.append([name for panel in (quality, loss) for name in _phases(panel, lines)])
        for panel in (quality, loss):
            panel.set_xlabel("epoch of this client, all phases in order")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.draw_without_rendering()  # widths are known from here on
    for client, panel, of_row in zip(clients, panels[:, 0], names, strict=True):
        panel.set_title(client, pad=8 + _NAME_HEIGHT * _stagger(of_row))
    return figure


def _curves(panel: Axes, lines: list[Json], names: list[str], ylabel: str) -> None:
    """Curves that end with each phase: what trains in the next one is another model."""
    panel.set_ylabel(ylabel)
    if not names:
        panel.text(0.5, 0.5, "nothing recorded", ha="center", va="center", transform=panel.transAxes, color=GREY)
        return
    drawn: list[float] = []
    ends = [i for i in range(1, len(lines)) if lines[i].get("phase") != lines[i - 1].get("phase")]
    epochs = np.insert(np.arange(1.0, len(lines) + 1), ends, np.nan)
    for i, name in enumerate(names):
        values = np.insert([_number(line["metrics"].get(name)) for line in lines], ends, np.nan)
        if i and any(np.array_equal(values, earlier.get_ydata(), equal_nan=True) for earlier in panel.lines):
            continue  # the same quantity logged under two names
        panel.plot(epochs, values, color=COLOURS[i % len(COLOURS)], marker=".", markersize=4, label=name)
        drawn.extend(values[np.isfinite(values)])
    if drawn and min(drawn) > 0 and max(drawn) > 100 * min(drawn):
        panel.set_yscale("log")
    if len(panel.lines) == 1:
        panel.set_ylabel(str(panel.lines[0].get_label()))
    else:
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _stretch(line: Json) -> tuple[Any, bool]:
    """Phase of an epoch, and whether it was trained within a federated round or locally after the rounds."""
    return line.get("phase"), line.get("round") is None


def _phases(panel: Axes, lines: list[Json]) -> list[Annotation]:
    """Shade each other phase and name it above the panel; rounds are counted in the name.

    Returns:
        The names.
    """
    start, names = 0, []
    for i in range(1, len(lines) + 1):
        if i < len(lines) and _stretch(lines[i]) == _stretch(lines[start]):
            continue
        if rounds := {line.get("round") for line in lines[start:i]} - {None}:
            name = f"{lines[start].get('phase')} ({len(rounds)} round{'s' if len(rounds) > 1 else ''})"
        else:
            name = f"local {lines[start].get('phase')}" if lines[start].get("phase") else ""
        panel.axvspan(start + 0.5, i + 0.5, color="#eef2f7" if rounds else "white", zorder=0)
        panel.axvline(i + 0.5, color="#d1d5db", linewidth=0.8, zorder=0)
        names.append(
            panel.annotate(
                name,
                ((start + i + 1) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=GREY,
            )
        )
        start = i
    panel.set_xlim(0.5, len(lines) + 0.5)
    return names


def _stagger(names: list[Annotation]) -> int:
    """Move each name that would lie on one before it to the lowest free line above; the number of lines."""
    ends: list[float] = []  # of the last name on each line
    for name in names:
        box = name.get_window_extent()
        line = next((i for i, end in enumerate(ends) if end + 4 < box.x0), len(ends))
        ends[line : line + 1] = [box.x1]
        name.xyann = (0, 3 + _NAME_HEIGHT * line)
    return len(ends)


def _quality_names(lines: list[Json]) -> list[str]:
    counts = Counter(name for line in lines for name in line["metrics"])
    for wanted in ("ndcg@10", "hit@1"):  # among candidates: the catalogue's values live on another scale
        names = [name for name, _ in counts.most_common() if wanted in name and "full_" not in name]
        if names:
            return names[:MAX_LINES]
    return [name for name, _ in counts.most_common() if name.startswith("val") and "loss" not in name][:MAX_LINES]


def _loss_names(lines: list[Json]) -> list[str]:
    counts = Counter(name for line in lines for name in line["metrics"])
    losses = [name for name, _ in counts.most_common() if "loss" in name or name.startswith("train")]
    return [name for name in losses if not name.endswith("_step") and not name.startswith("val")][:MAX_LINES]


def cosine_plot(privacy: dict[str, list[Json]]) -> Figure | None:
    """How much of an item vector survives the noise, and how close the aggregated vector lies to it."""
    figure, panels = _panels(privacy)
    if figure is None:
        return None
    for panel, (domain, entries) in zip(panels, privacy.items(), strict=True):
        sigma = [entry["sigma"] for entry in entries]
        low, high = _column(entries, "cosine_min"), _column(entries, "cosine_max")
        panel.fill_between(sigma, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="min to max over items")
        panel.plot(sigma, _column(entries, "cosine_mean"), "o-", color=COLOURS[0], markersize=4, label="sent, mean")
        panel.plot(sigma, _column(entries, "expected_cosine"), ":", color="black", label=r"$1/\sqrt{1 + D\sigma^2}$")
        returned = _column(entries, "global_cosine_mean")
        if np.isfinite(returned).any():
            panel.plot(sigma, returned, "s--", color=COLOURS[1], markersize=4, label="returned by the server, mean")
        _finish(panel, domain, entries, "cosine with the clean vector")
        panel.set_ylim(min(0.0, float(np.nanmin([*low, *returned, 0]))) - 0.02, 1.05)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, 1 + len(panels)))
    return figure


def linkage_plot(privacy: dict[str, list[Json]]) -> Figure | None:
    """Share of items that an attacker who holds the catalogue links back to their identity."""
    figure, panels = _panels(privacy)
    if figure is None:
        return None
    for panel, (domain, entries) in zip(panels, privacy.items(), strict=True):
        sigma = [entry["sigma"] for entry in entries]
        for key, marker, colour, label in (
            ("linkage_with_replacement", "o-", COLOURS[0], "nearest catalogue vector"),
            ("linkage_without_replacement", "s--", COLOURS[2], "one-to-one matching"),
        ):
            panel.plot(sigma, 100 * _column(entries, key), marker, color=colour, markersize=4, label=label)
        chances = _column(entries, "chance")
        if np.isfinite(chances).any():
            panel.axhline(100 * np.nanmean(chances), color=GREY, linestyle=":", label="chance")
        _finish(panel, domain, entries, "items linked by the attacker (%)")
        panel.set_ylim(-3, 105)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * min(2, len(panels)))
    return figure


def _panels(privacy: dict[str, list[Json]]) -> tuple[Figure | None, list[Axes]]:
    if not privacy:
        return None, []
    figure = Figure(figsize=(max(4.5, 3.9 * len(privacy)), 3.1), layout="constrained")
    return figure, list(figure.subplots(1, len(privacy), squeeze=False)[0])


def _finish(panel: Axes, domain: str, entries: list[Json], ylabel: str) -> None:
    panel.set_title(domain)
    panel.set_xlabel("noise σ, per coordinate of a unit vector")
    panel.set_ylabel(ylabel)
    for i, sigma in enumerate(entry["sigma"] for entry in entries if entry.get("used")):
        panel.axvline(sigma, color=COLOURS[5], linewidth=5, alpha=0.3, zorder=0, label=None if i else "σ of this run")


def timings_plot(timings: dict[str, Json]) -> Figure | None:
    """Wall-clock and CPU time of each stage."""
    if not timings:
        return None
    names = list(timings)
    y = np.arange(len(names))
    figure = Figure(figsize=(7.5, 0.9 + 0.34 * len(names)), layout="constrained")
    panel = figure.subplots()
    for offset, key, colour, label in ((-0.19, "wall_s", COLOURS[0], "wall clock"), (0.19, "cpu_s", COLOURS[4], "CPU")):
        seconds = np.array([_number(timings[name].get(key)) for name in names])
        bars = panel.barh(y + offset, np.nan_to_num(seconds), height=0.36, color=colour, label=label)
        panel.bar_label(bars, ["" if np.isnan(s) else f"{s:,.1f} s" for s in seconds], padding=3, fontsize=7.5)
    panel.set_yticks(y, names)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("seconds")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def _column(entries: list[Json], key: str) -> np.ndarray[Any, Any]:
    return np.array([_number(entry.get(key)) for entry in entries])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
