"""Ten million interactions from CSV: load, filter, split, draw candidates. Target: under 120 s and 6 GB on 2 cores.

Run: python benchmarks/data.py [--interactions 10000000] [--out benchmarks/results/data.json]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write_source(folder: Path, interactions: int, seed: int = 0) -> None:
    """Write CSV files with Zipf-like items, geometric histories, unsorted times and some duplicates."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    generator = np.random.default_rng(seed)
    users, items = interactions // 12, interactions // 50
    user = np.sort(generator.geometric(6 / users, size=interactions) % users)
    weights = 1 / (10 + np.arange(items)) ** 0.8
    item = generator.choice(items, size=interactions, p=weights / weights.sum())
    stamp = 1_300_000_000 + generator.integers(0, 2000, size=interactions) * 86_400
    table = pa.table({"user_id": user, "item_id": item, "timestamp": stamp})
    pacsv.write_csv(table, folder / "interactions.csv")
    titles = [f"Product number {number} of the catalogue" for number in range(items)]
    pacsv.write_csv(pa.table({"item_id": np.arange(items), "title": titles}), folder / "items.csv")


def measure(folder: Path) -> dict[str, object]:
    """Time the stages in this process; memory is the peak of the whole process."""
    start = time.perf_counter()
    from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
    from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain
    from lightning_sfubm.datamodules.readers.table import TableReader
    from lightning_sfubm.datamodules.splits import leave_one_out, train_counts
    from lightning_sfubm.datamodules.storage import save_domain

    stages: dict[str, float] = {}

    def stage(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        stages[name] = round(now - start, 2)
        start = now

    imported = _peak_gb()
    stage("import")
    reader = TableReader(str(folder))
    reader.fingerprint(None)
    stage("hash the source")
    raw = reader.read(None)
    stage("load")
    domain = build_domain(raw, "benchmark", PreprocessSettings(k_core=5))
    stage("filter")
    splits = leave_one_out(domain.offsets, 1)
    train_counts(domain, splits)
    stage("split")
    save_domain(domain, folder / "entry")
    stage("store")
    card = domain.card
    del raw, domain, splits
    first = DomainDataModule("benchmark", reader)
    first.setup()
    stage("whole set-up, first run (hash, load, filter, store, split, two candidate lists)")
    second = DomainDataModule("benchmark", reader)
    second.setup()
    stage("whole set-up, second run (cache)")
    batches = sum(1 for _ in second.train_dataloader())
    stage("one epoch of training batches")
    return {
        "seconds": stages,
        "load_filter_split_seconds": round(sum(stages[name] for name in ("load", "filter", "split")), 2),
        "peak_gb": round(_peak_gb(), 2),
        "peak_gb_after_import": round(imported, 2),
        "cpu_seconds": round(time.process_time(), 1),
        "train_batches": batches,
        "before": vars(card.before),
        "after": vars(card.after),
        "rules": {rule: count for rule, count in card.rules.items() if count},
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_source(folder, arguments.interactions)
        # A process of its own: the peak must not hold what writing the source took.
        variables = {**os.environ, "SFUBM_CACHE": str(folder / "cache")}
        command = [sys.executable, __file__, "--measure", str(folder)]
        output = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    from lightning_sfubm.evaluation.environment import environment  # here: the child process times its imports

    result["load_average_at_end"] = os.getloadavg()[0]
    result["environment"] = environment()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
