"""All measured figures beside what they aim at: `python benchmarks/summary.py`.

Reads benchmarks/results/*.json, prints a table and draws docs/images/performance.png: each figure as a share of its aim,
so that everything left of 1 is met, in the colour of the machine it was measured on. What has not been measured is named,
not left out.
"""

import json
import operator
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

RESULTS = Path(__file__).parent / "results"
COLOURS, MISSED = ("#0f766e", "#334155", "#7c3aed", "#0369a1"), "#c2410c"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "performance.png"

#: what is measured, file of the result, how it is found there, the aim, whether it is an upper bound
FIGURES: list[tuple[str, str, Callable[[Any], float], float, bool]] = [
    ("SASRec, one epoch of Beauty, CPU-s", "stage1", lambda d: d["epoch_cpu_s"]["chunked, auto"], 6.0, True),
    ("the same under the Trainer, CPU-s", "stage1", lambda d: d["trained"]["epoch_cpu_s"], 6.0, True),
    ("GRU4Rec, one epoch of Beauty, CPU-s", "stage1", lambda d: d["epoch_cpu_s"]["GRU4Rec, chunked, auto"], 7.0, True),
    ("SASRec on Beauty, peak GB", "stage1", operator.itemgetter("peak_rss_gb"), 1.0, True),
    ("test NDCG@10 after 100 CPU-s, Beauty", "stage1", lambda d: d["trained"]["ndcg@10"], 0.050, False),
    ("test NDCG@10 after 100 CPU-s, MovieLens-100K", "quality", operator.itemgetter("ndcg@10"), 0.096, False),
    ("SASRec, NDCG@10 over the best peer's, Beauty", "peers", lambda d: _over_peer(d, "sasrec", 120), 0.98, False),
    ("GRU4Rec, NDCG@10 over the peer's, Beauty", "peers", lambda d: _over_peer(d, "gru4rec", 120), 0.98, False),
    (
        "SASRec over the best peer, MovieLens-100K",
        "peers_movielens",
        lambda d: _over_peer(d, "sasrec", 100),
        0.98,
        False,
    ),
    ("GRU4Rec over the peer, MovieLens-100K", "peers_movielens", lambda d: _over_peer(d, "gru4rec", 100), 0.98, False),
    ("SASRec over the best peer, Food, 150 CPU-s", "peers_food", lambda d: _over_peer(d, "sasrec", 150), 0.98, False),
    ("SASRec over the best peer, Food, 600 CPU-s", "peers_food", lambda d: _over_peer(d, "sasrec", 600), 0.98, False),
    ("GRU4Rec over the peer, Food", "peers_food", lambda d: _over_peer(d, "gru4rec", 150), 0.98, False),
    ("full-catalogue evaluation, users a CPU-s", "stage1", operator.itemgetter("eval_users_per_cpu_s"), 8000, False),
    ("epoch with 1 M items over 10 k items", "catalogue", lambda d: d["rows"][-1]["ratio"], 1.5, True),
    ("1 M items, peak GB", "catalogue", lambda d: d["rows"][-1]["peak_gb"], 8.0, True),
    ("titles encoded, share of a bare bf16 loop", "text", operator.itemgetter("ratio"), 0.9, False),
    ("LLM tuning, real tokens over a padded loop", "tuning", lambda d: d["branch"]["ratio"], 1.5, False),
    ("ranking by branch over one forward pass", "llm", lambda d: d["ranking"]["branch_over_one_forward"], 1.15, True),
    ("ranking by score over one forward pass", "llm", lambda d: d["ranking"]["score_over_one_forward"], 1.15, True),
    ("separate rows over branch", "llm", lambda d: d["ranking"]["separate_rows_over_branch"], 5.0, False),
    ("generated answers over batch-1 generate", "generation", operator.itemgetter("ratio"), 3.0, False),
    ("ranking by branch over batch-1 generate", "generation", operator.itemgetter("branch_ratio"), 2.0, False),
    ("constrained over free decoding, time", "generation", operator.itemgetter("constrained_over_free"), 1.0, True),
    (
        "10 M interactions: load, filter, split, s",
        "data",
        lambda d: d["seconds"]["whole set-up, first run (hash, load, filter, store, split, two candidate lists)"],
        120.0,
        True,
    ),
    ("10 M interactions, peak GB", "data", operator.itemgetter("peak_gb"), 6.0, True),
    ("federated loop, share not training", "loop", operator.itemgetter("overhead_share"), 0.05, True),
    ("two clients in two workers, speed-up", "federated", lambda d: d["workers"]["speed_up"], 1.6, False),
    ("200 clients, 10 rounds of 20, s", "federated", lambda d: d["clients"]["wall_s"], 300.0, True),
    ("secure aggregation, 1 M of 10 clients, s", "federated", lambda d: d["secure"]["wall_s"], 5.0, True),
    ("knn_mix, 2 x 100,000 vectors, s", "federated", lambda d: d["knn_mix"]["wall_s"], 60.0, True),
    ("kmeans, 2 x 100,000 vectors, s", "federated", lambda d: d["kmeans"]["wall_s"], 60.0, True),
    ("--help, s", "startup", operator.itemgetter("help_wall_s"), 1.5, True),
    ("fit to its first step, demo, s", "startup", operator.itemgetter("first_step_wall_s"), 10.0, True),
]


def collect() -> list[dict[str, Any]]:
    """Every figure with its aim; ``value`` is ``None`` where there is no result."""
    rows = []
    for name, file, find, aim, upper in FIGURES:
        path = RESULTS / f"{file}.json"
        value = find(json.loads(path.read_text())) if path.exists() else None
        met = None if value is None else (value <= aim if upper else value >= aim)
        rows.append({"what": name, "value": value, "aim": aim, "upper": upper, "met": met, "machine": _machine(path)})
    return rows


def _over_peer(peers: dict[str, Any], model: str, cpu_s: int) -> float:
    return float(peers["comparison"][model][str(cpu_s)]["test_ratio"])


def _machine(path: Path) -> str:
    """The processor a result is from, as far as it is recorded."""
    if not path.exists():
        return ""
    facts = json.loads(path.read_text())
    parts = [facts, *(part for part in facts.values() if isinstance(part, dict))]  # or each part has its own
    cpus = [part["environment"]["hardware"]["cpu"] for part in parts if "environment" in part]
    found = next(iter(cpus), None) or facts.get("machine", {}).get("processor")
    return "not recorded" if not found else str(found).replace("(R)", "").replace(" Processor", "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| what | measured | aim | | machine |", "| --- | --- | --- | --- | --- |"]
    words = {True: "met", False: "**missed**", None: "not measured"}
    for row in rows:
        value = "–" if row["value"] is None else f"{row['value']:,.4g}"
        lines.append(
            f"| {row['what']} | {value} | {'≤' if row['upper'] else '≥'} {row['aim']:,g} | {words[row['met']]} | "
            f"{row['machine']} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One bar a figure, on a logarithmic scale: cost or shortfall as a share of the aim.

    Args:
        rows: see :func:`collect`.
    """
    known = [row for row in rows if row["value"]][::-1]
    shares = [row["value"] / row["aim"] if row["upper"] else row["aim"] / row["value"] for row in known]
    figure = Figure(figsize=(9, 0.32 * len(known) + 1.2))
    axes = figure.subplots()
    machines = sorted({row["machine"] for row in known})
    colours = dict(zip(machines, cycle(COLOURS)))
    drawn = [colours[row["machine"]] if row["met"] else MISSED for row in known]
    axes.barh(range(len(known)), shares, color=drawn)
    entries = [*colours.items(), *([("missed", MISSED)] if MISSED in drawn else [])]
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in entries],
        fontsize=8,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
    )
    axes.axvline(1.0, color="#1e293b", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.set_yticks(range(len(known)), [row["what"] for row in known], fontsize=8)
    for place, (row, share) in enumerate(zip(known, shares, strict=True)):
        inside = 0.5 < share <= 1.0  # beside the bar's end the number would lie on the line
        axes.annotate(
            f"{row['value']:,.3g}",
            (share, place),
            xytext=(-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            color="white" if inside else "black",
        )
    axes.set_xlabel("measured over aim (aim over measured where more is better); 1 and below is met")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    """Command line; see the head of this file."""
    rows = collect()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(rows).savefig(PICTURE, dpi=110)
    print(table(rows))
    print(f"\n{sum(row['met'] is True for row in rows)} of {len(rows)} met. Picture: {PICTURE}")


if __name__ == "__main__":
    main()
