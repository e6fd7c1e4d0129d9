"""Figures of the privacy report and of the curves over runs. Pure functions from facts to matplotlib figures."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_sfubm.audit.replay import GLOBAL
from lightning_sfubm.evaluation.report_plots import COLOURS, GREY, STYLE, cosine_plot, linkage_plot
from lightning_sfubm.evaluation.run_folder import Json
from lightning_sfubm.privacy.rounding import round_up

SCORES = {"loss": "by loss", "calibrated": "against shadow models"}


def privacy_figures_of(facts: Json) -> dict[str, Figure]:
    """All figures for which there are data, out of ``rounds``, ``epsilon``, ``cosine`` and ``linkage``."""
    with matplotlib.rc_context(STYLE):
        drawn = {
            "rounds": rounds_plot(facts["attacks"]["membership"]),
            "epsilon": epsilon_plot(facts["curve"]),
            "cosine": cosine_plot(facts["perturbation"]),
            "linkage": linkage_plot(facts["perturbation"]),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def rounds_plot(membership: list[Json]) -> Figure | None:
    """Area of membership inference by loss after each round, one panel a domain."""
    domains = list(dict.fromkeys(row["domain"] for row in membership if row["score"] == "loss"))
    if not domains:
        return None
    figure = Figure(figsize=(max(4.8, 3.9 * len(domains)), 3.2), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False, sharey=True)[0]
    panels[0].set_ylabel("area under ROC")
    for panel, domain in zip(panels, domains, strict=True):
        rows = [row for row in membership if row["domain"] == domain and row["score"] == "loss"]
        for colour, shift, client in zip(COLOURS, (-0.06, 0.06), (domain, GLOBAL), strict=False):
            line = [row for row in rows if row["client"] == client]
            if line:
                label = "aggregated teacher" if client == GLOBAL else "the client's own update"
                _intervals(panel, [row["round"] + shift for row in line], [row["auc"] for row in line], colour, label)
        _chance(panel, 0.5)
        panel.set_title(domain)
        panel.set_xlabel("round")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def epsilon_plot(points: list[Json]) -> Figure | None:
    """Membership inference and utility against epsilon, one row a domain; a run without a guarantee stands at infinity."""
    measured = [point for point in points if point["membership"]]
    domains = list(dict.fromkeys(point["domain"] for point in measured))
    if not domains or len({point["epsilon"] for point in measured}) < 2:
        return None
    figure = Figure(figsize=(10.5, 0.5 + 2.9 * len(domains)), layout="constrained")
    grid = figure.subplots(len(domains), 3, squeeze=False)
    allowed = "most that (ε, δ) allows" + (" (* in a simulation)" if any(p.get("simulated") for p in measured) else "")
    for (area, rate, utility), domain in zip(grid, domains, strict=True):
        line = sorted(
            (point for point in measured if point["domain"] == domain), key=lambda point: point["epsilon"] or np.inf
        )
        x = np.arange(len(line))
        for panel, key, chance, title in (
            (area, "auc", 0.5, "area under ROC"),
            (rate, "tpr", 0.01, "TPR at 1 % FPR"),
        ):
            for colour, (score, label) in zip(COLOURS, SCORES.items(), strict=False):
                found = [
                    (i, point["membership"][score][key]) for i, point in enumerate(line) if score in point["membership"]
                ]
                if found:
                    _intervals(panel, [i for i, _ in found], [value for _, value in found], colour, label)
            limits = [_limit(point, key) for point in line]
            panel.plot(x, limits, ":", color="black", linewidth=1, label=allowed)
            _chance(panel, chance)
            panel.set_title(f"{domain}: membership, {title}")
        area.set_ylim(0.4, 1.02)
        top = max(float(row[1]["tpr"]["high"]) for point in line for row in point["membership"].items())
        rate.set_ylim(0, max(0.05, 1.15 * top))
        for colour, (branch, metric, style) in zip(
            (COLOURS[2], COLOURS[2], COLOURS[3], COLOURS[3]),
            (
                ("teacher", "hit@1", "o-"),
                ("teacher", "ndcg@10", "o--"),
                ("student", "hit@1", "s-"),
                ("student", "ndcg@10", "s--"),
            ),
            strict=True,
        ):
            values = [(i, p["utility"][branch][metric]["value"]) for i, p in enumerate(line) if branch in p["utility"]]
            if values:
                name = {"hit@1": "Hit@1", "ndcg@10": "NDCG@10"}[metric]
                utility.plot(*zip(*values, strict=True), style, color=colour, markersize=4, label=f"{branch}, {name}")
        utility.set_title(f"{domain}: utility on test users")
        utility.set_ylim(bottom=0)
        for panel in (area, rate, utility):
            panel.set_xticks(x, [_epsilon(p) for p in line])
            panel.set_xlabel("ε")
    named = [pair for panel in (area, utility) for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*named, strict=True), loc="outside lower center", ncols=4)
    return figure


def sigma_plot(points: list[Json]) -> Figure | None:
    """Hit@1 beside linkage and cosine against the noise on item vectors, one panel a domain."""
    points = [point for point in points if point["linkage"] and point["utility"]]
    domains = list(dict.fromkeys(point["domain"] for point in points))
    if not domains:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(domains), 3.4), layout="constrained")
        for panel, domain in zip(figure.subplots(1, len(domains), squeeze=False)[0], domains, strict=True):
            line = sorted((point for point in points if point["domain"] == domain), key=lambda point: point["sigma"])
            x = [point["sigma"] for point in line]
            shares = [point["linkage"]["with_replacement"] for point in line]
            _intervals(panel, x, shares, COLOURS[0], "items linked, nearest vector")
            cosines = [point["linkage"]["cosine_mean"] for point in line]
            panel.plot(x, cosines, "^-", color=COLOURS[4], markersize=4, label="cosine of sent and clean vector")
            for branch, colour in (("teacher", COLOURS[2]), ("student", COLOURS[3])):
                hits = [point["utility"].get(branch, {}).get("hit@1") for point in line]
                if all(hits):
                    _intervals(panel, x, hits, colour, f"Hit@1, {branch}")
            panel.set_title(domain)
            panel.set_xlabel("noise σ, per coordinate of a unit vector")
            panel.set_ylim(0, 1.05)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def _epsilon(point: Json) -> str:
    """As a tick; a star where the noise follows from the run's seed."""
    if point["epsilon"] is None:
        return "∞ (none)"
    return round_up(point["epsilon"], 3) + ("*" if point.get("simulated") else "")


def _limit(point: Json, key: str) -> float:
    limit = next(iter(point["membership"].values())).get("limit")
    return float(limit[key]) if limit and limit[key] is not None else np.nan


def _intervals(panel: Axes, x: Any, estimates: list[Json], colour: str, label: str) -> None:
    value, low, high = (np.array([e[key] for e in estimates], dtype=float) for key in ("value", "low", "high"))
    panel.errorbar(
        x, value, yerr=[value - low, high - value], fmt="o-", color=colour, markersize=4, capsize=2, label=label
    )


def _chance(panel: Axes, level: float) -> None:
    panel.axhline(level, color=GREY, linestyle="--", linewidth=1, label="chance")
