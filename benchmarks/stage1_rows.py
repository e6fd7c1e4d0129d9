"""Are the results still those that were published? `python benchmarks/stage1_rows.py [--out runs/results/stage1_grid]`.

After `lightning-sfubm results --grid benchmarks/stage1_grid.yaml --root DIR --jobs 2`: each of its rows on all test users
beside the published row of the same method, domain and seed, and whether Hit@1 lies in the published 95 % interval. Ends with
code 1 where a row does not. Writes benchmarks/results/stage1_rows.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.grid.cells import Json, all_cells

RESULTS = Path(__file__).parent / "results" / "stage1_rows.json"
PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "results" / "health_beauty"


def keyed(cells: list[Json]) -> dict[tuple[str, str, int], Json]:
    """Cells of all test users by domain, method and seed."""
    return {(c["domain"], c["method"], c["seed"]): c for c in cells if c["domain"].endswith(", all users")}


def compare(again: list[Json], published: list[Json]) -> list[dict[str, Any]]:
    """One entry for every cell that both have.

    Raises:
        SystemExit: a row was ranked among other candidates than the published one, so that the two cannot be compared.
    """
    before, rows = keyed(published), []
    for key, cell in keyed(again).items():
        if (old := before.get(key)) is None:
            continue
        if cell["candidate_hash"] != old["candidate_hash"]:
            raise SystemExit(f"{key}: other candidate lists than the published row; data or split have changed")
        interval, value = old["metrics"]["hit@1"], cell["metrics"]["hit@1"]["value"]
        rows.append(
            {
                "domain": key[0],
                "method": key[1],
                "label": cell["label"],
                "published": interval,
                "again": value,
                "inside": interval["low"] <= value <= interval["high"],
                "train_cpu_s": cell["train_cpu_s"],
                "train_cpu_s_published": old["train_cpu_s"],
            }
        )
    return rows


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/results/stage1_grid"), help="output folder of the grid")
    cells = all_cells(parser.parse_args().out)
    rows = compare(cells, all_cells(PUBLISHED))
    if not rows:
        raise SystemExit("no row to compare: run the grid first, and name its output folder by --out")
    table = Table("domain", "method", "published Hit@1", "again", "inside", "CPU-s then", "now", title="All test users")
    for row in rows:
        low, high = row["published"]["low"], row["published"]["high"]
        was = f"{row['published']['value']:.3f} [{low:.3f}, {high:.3f}]"
        times = (f"{row[name] or 0:.0f}" for name in ("train_cpu_s_published", "train_cpu_s"))
        inside = "yes" if row["inside"] else "NO"
        table.add_row(row["domain"].split(",")[0], row["label"], was, f"{row['again']:.3f}", inside, *times)
    Console().print(table)
    count = sum(row["inside"] for row in rows)
    print(f"{count} of {len(rows)} rows within the published interval")
    facts = {"inside": count, "of": len(rows), "rows": rows, "environment": environment()}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    if count < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
