"""Fill the tables of docs/results.md and docs/joining.md from the published cells.

    python docs/results/page.py            # rewrites what stands below the mark of each table
    python docs/results/page.py --check    # fails if a page says anything else

A mark is ``<!-- table: NAME -->``; the table ends before the next blank line. What stands outside of tables is written by hand.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from lightning_sfubm.grid.cells import all_cells
from lightning_sfubm.grid.comparisons import by_seed, still_given
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.grid.tables import ordered, seconds
from lightning_sfubm.methods import METHODS

HERE = Path(__file__).parent
PAGES = (HERE.parent / "results.md", HERE.parent / "joining.md")
PAIRS = {
    "health_beauty": ("beauty", "health"),
    "food_kitchen": ("food", "kitchen"),
    "books_movielens": ("books", "movielens"),
}
NAMES = {"health_beauty": "Health-Beauty", "food_kitchen": "Food-Kitchen", "books_movielens": "Books-MovieLens"}
DOMAINS = [(pair, domain) for pair, domains in PAIRS.items() for domain in domains]
#: of each table the rows by label (a row's key, or those of a difference); see the file
ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MAIN: dict[str, str] = ROWS["main"]
COSTS = {
    label: MAIN[label]
    for label in MAIN
    if label
    not in ("Random", "Popularity", "Text similarity, untrained", "UniSRec, inductive", "UniSRec, transductive")
}
RANKS_CANDIDATES = ("Late", "the same", "**Late", "Random", "Text")


@cache
def rows_of(grid: str) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Published cells that a grid has, by pair and domain, then by row; of the silos' grid those with even batches apart."""
    file = HERE.parents[1] / "configs" / "results" / f"{grid.removesuffix('_even')}.yaml"
    chosen = load_grid(file, set(METHODS))
    return ordered(chosen, all_cells(HERE / grid))


def cells(pair: str, domain: str, method: str, grid: str = "") -> list[dict[str, Any]]:
    """The cells of a row, by seed; none where it was not run, or with other settings than the grid (the pair's own) has."""
    return rows_of(grid or pair).get((pair, domain), {}).get(method, [])


@cache
def facts(grid: str) -> list[dict[str, Any]]:
    """Published paired differences that a grid's cells still give: none of rows that :func:`cells` leaves out."""
    found: list[dict[str, Any]] = json.loads((HERE / grid / "comparisons.json").read_text())
    return [fact for fact in found if still_given(rows_of(grid), fact)]


def short(value: float, digits: int) -> str:
    """A share without its leading zero."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """A difference, with a proper minus."""
    text = short(abs(value), digits)
    return ("" if float(text) == 0 else "+" if value > 0 else "−") + text


def mean(pair: str, domain: str, method: str, metric: str, digits: int, grid: str = "") -> str:
    """Mean over seeds, with their standard deviation where there are several."""
    values = [cell["metrics"][metric]["value"] for cell in cells(pair, domain, method, grid)]
    if not values or None in values:
        return "–"
    spread = f" ± {short(statistics.stdev(values), digits)}" if len(values) > 1 else ""
    return short(statistics.mean(values), digits) + spread


def corrected(fact: dict[str, Any]) -> str:
    """The p after correction; a small one to its order alone, for it changes with the number of differences in the grid."""
    p = fact["p_holm"]
    if p < 1e-6:
        return "p < 1e-6"
    return f"p {'≈ ' if fact.get('p_approximate') and p < 1 else ''}{p:.2g}"


def difference(grid: str, a: str, b: str, domain: str = "pooled, all users", full: bool = False) -> str:
    """A paired difference with its interval, the corrected p and the seeds where there are several."""
    for fact in facts(grid):
        if (fact["domain"], fact["a"], fact["b"]) == (domain, a, b):
            names = ("full_difference", "full_low", "full_high") if full else ("difference", "low", "high")
            if fact[names[0]] is None:
                return "–"
            value, low, high = (signed(fact[name], 4 if full else 3) for name in names)
            seeds = f", {fact['seeds']} seeds" if fact["seeds"] > 1 else ""
            return f"{value} [{low}, {high}]" + (seeds if full else f", {corrected(fact)}{seeds}")
    return "–"


def lines(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main_rows(metric: str, digits: int, everything: bool) -> str:
    """The main rows in all domains."""
    rows = [
        [label, *(mean(pair, f"{domain}, all users", method, metric, digits) for pair, domain in DOMAINS)]
        for label, method in MAIN.items()
        if everything or not label.startswith(RANKS_CANDIDATES)
    ]
    shown = [row for row in rows if set(row[1:]) != {"–"}]
    return lines(["row", *(domain.capitalize().replace("lens", "Lens") for _, domain in DOMAINS)], shown)


def costs() -> str:
    """What beside what it takes: Hit@1 and CPU seconds of training, of the rows that train something, all users."""
    rows = []
    for label, method in COSTS.items():
        row = [label]
        for pair, domain in DOMAINS:
            found = cells(pair, f"{domain}, all users", method)
            spent = [cell["train_cpu_s"] for cell in found if cell.get("train_cpu_s") is not None]
            hit = statistics.mean(cell["metrics"]["hit@1"]["value"] for cell in found) if found else None
            row.append(f"{short(hit, 3)}; {seconds(statistics.mean(spent))}" if hit is not None and spent else "–")
        rows.append(row)
    shown = [row for row in rows if set(row[1:]) != {"–"}]
    return lines(["row", *(domain.capitalize().replace("lens", "Lens") for _, domain in DOMAINS)], shown)


def paired(
    chosen: dict[str, tuple[str, str]],
    domain: str = "pooled, all users",
    full: bool = False,
    grids: tuple[str, ...] = (*PAIRS,),
) -> str:
    """Pooled differences of every pair."""
    rows = [[label, *(difference(grid, a, b, domain, full) for grid in grids)] for label, (a, b) in chosen.items()]
    return lines(["difference", *NAMES.values()], [row for row in rows if set(row[1:]) != {"–"}])


def llm_rows() -> str:
    """Rows beside the ROWS["llm"], on the users it ranks."""
    rows = [
        [label, *(mean(pair, domain, method, "hit@1", 3) for pair, domain in DOMAINS)]
        for label, method in ROWS["llm"].items()
    ]
    return lines(["row", *(domain.capitalize().replace("lens", "Lens") for _, domain in DOMAINS)], rows)


def written() -> str:
    """How many answers of a generating row name exactly one candidate, and how many the right one."""
    pair, rows = "health_beauty", []
    for label, method in ROWS["written"].items():
        values = [
            mean(pair, domain, method, metric, 3) for metric in ("valid_ratio", "hit@1") for domain in PAIRS[pair]
        ]
        rows.append([label, *values])
    return lines(["row", "valid, Beauty", "Health", "Hit@1, Beauty", "Health"], rows)


def everyone() -> str:
    """Rows of 10,000 users of Beauty and of Health beside those of all of them."""
    rows = []
    for label, (some, of_all) in ROWS["everyone"].items():
        values = []
        for domain, run in (("beauty", "beauty"), ("health", "health_alone")):
            of_domain = of_all.replace("alone", run).replace("baselines", f"{domain}_baselines")
            values += [
                mean("health_beauty", f"{domain}, all users", method, metric, digits, grid)
                for method, grid in ((some, "health_beauty"), (of_domain, "full_data"))
                for metric, digits in (("hit@1", 3), ("full_ndcg@10", 4))
            ]
        rows.append([label, *values])
    heads = [
        head
        for name, users in (("Beauty", "22,332"), ("Health", "38,329"))
        for head in (f"{name}, 10,000 users", "full NDCG@10", f"{name}, all {users}", "full NDCG@10")
    ]
    return lines(["row", *heads], rows)


def ablations() -> str:
    """What the parts of distillation bring to the student, on Health and Beauty."""
    pair, everyone, rows = "health_beauty", ", all users", []
    for label, row in ROWS["ablations"].items():
        values = [
            mean(pair, domain + everyone, row, metric, digits)
            for metric, digits in (("hit@1", 3), ("full_ndcg@10", 4))
            for domain in PAIRS[pair]
        ]
        whole = f"{row.partition('.')[0]}.stage1"
        rows.append([label, *values, "" if row == whole else difference(pair, whole, row)])
    return lines(["student", "Beauty", "Health", "Beauty, full NDCG@10", "Health", "default − this, Hit@1"], rows)


def again() -> str:
    """Differences of the default's rows in the first runs and in those with other seeds, of the pairs that have both."""
    runs = [(pair, run) for pair in PAIRS for run in ("default", "default_again") if facts_of(pair, "default_again")]
    rows = [
        [label, *(difference(pair, f"{run}.{a}", f"{run}.{b}", domain) for pair, run in runs)]
        for label, (a, b, domain) in ROWS["again"].items()
    ]
    heads = [NAMES[pair] + (", run again" if run == "default_again" else "") for pair, run in runs]
    return lines(["difference", *heads], rows)


def facts_of(grid: str, run: str) -> list[dict[str, Any]]:
    """The published differences between rows of a run."""
    return [fact for fact in facts(grid) if fact["a"].startswith(f"{run}.")]


def silos(chosen: dict[str, Any]) -> str:
    """What joining brings each silo. Bold: its best row that breaks no privacy, and differences that stand after correction."""
    grid, rows = "silos_even", []
    for label, (pair, domain, run, *trains) in chosen["rows"].items():
        hits = {
            name: statistics.mean(cell["metrics"]["hit@1"]["value"] for cell in found)
            for name, row in chosen["hits"].items()
            if (found := cells(pair, domain, f"{run}.{row}", grid))
        }
        shown = {name: short(hit, 3) for name, hit in hits.items()}
        best = max((shown[name] for name in hits if name != "pooled"), default=None)
        alone_best = sum(shown[name] == best for name in hits if name != "pooled") == 1
        values = [
            f"**{hit}**" if hit == best and alone_best and name != "pooled" else hit for name, hit in shown.items()
        ]
        found = {(f["a"], f["b"]): f for f in facts(grid) if (f["pair"], f["domain"]) == (pair, domain)}
        of = {name: found[f"{run}.{a}", f"{run}.{b}"] for name, (a, b) in chosen["differences"].items()}
        said = [
            ", ".join(map(signed, by_seed(rows_of(grid), fact))) if name == "by seed" else bold_where_it_stands(fact)
            for name, fact in of.items()
        ]
        seeds = [str(next(iter(of.values()))["seeds"]), *trains] if chosen.get("trains") else []
        rows.append([label, *seeds, *(values or [""] * len(chosen["hits"])), *said])
    more = ["seeds", "trains on"] if chosen.get("trains") else []
    return lines(["silo", *more, *chosen["hits"], *chosen["differences"]], rows)


def bold_where_it_stands(fact: dict[str, Any]) -> str:
    """A difference with its interval, bold where its p is below .05 after correction."""
    value, low, high = (signed(fact[name]) for name in ("difference", "low", "high"))
    mark = "**" if fact["p_holm"] < 0.05 else ""
    return f"{mark}{value} [{low}, {high}]{mark}"


TABLES: dict[str, Callable[[], str]] = {
    "main": lambda: main_rows("hit@1", 3, everything=True),
    "full": lambda: main_rows("full_ndcg@10", 4, everything=False),
    "differences": lambda: paired(ROWS["differences"]),
    "again": again,
    "full differences": lambda: paired(
        {k: v for k, v in ROWS["differences"].items() if "fusion" not in k and "teacher" not in k}, full=True
    ),
    "costs": costs,
    "exchange": lambda: paired(ROWS["exchange"], grids=("health_beauty", "food_kitchen", "books_4000")),
    "llm": llm_rows,
    "llm differences": lambda: paired(ROWS["llm_differences"], domain="pooled"),
    "ablations": ablations,
    "written": written,
    "everyone": everyone,
    **{name: partial(silos, chosen) for name, chosen in ROWS["silos"].items()},
}


def fill(page: Path) -> str:
    """A page with every marked table made anew; ends the command where a mark names no table."""

    def filled(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            sys.exit(f"{page}: there is no table '{match[2]}'; there are {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]]() + "\n"

    return re.sub(r"(<!-- table: (.+?) -->\n)(?:\|.*\n)*", filled, page.read_text(encoding="utf-8"))


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the page differs")
    check = parser.parse_args().check
    for page in PAGES:
        after = fill(page)
        if not check:
            page.write_text(after, encoding="utf-8")
        elif after != page.read_text(encoding="utf-8"):
            sys.exit(f"{page} differs from the published cells: run python docs/results/page.py")


if __name__ == "__main__":
    main()
