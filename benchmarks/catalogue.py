"""Cost of training by the number of items: `python benchmarks/catalogue.py [--items 10000 100000 1000000]`.

SASRec (d 64, 2 layers, L 50, batch 128) on the same number of targets with histories as short as Beauty's (median 6) and items
drawn by Zipf's law from catalogues of different sizes; softmax over the target and 1,024 shared negatives with the log-Q
correction, item vectors moved by touched rows (configs/encoder/large_catalogue.yaml). Beside it what a user would have
otherwise: the same loss with the whole table moved, and the full softmax. One thread, CPU seconds of an epoch, steps of all
variants in turn, medians. Each size runs in a process of its own, which tells its peak memory. Writes
benchmarks/results/catalogue.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

RESULTS = Path(__file__).parent / "results" / "catalogue.json"
TARGETS, ROWS, LENGTH = 127_845, 128, 50  # targets of an epoch of Beauty
LIMITS = {"ratio_to_smallest": 1.5, "peak_gb": 8.0}
ROW_WISE = {"loss": "sampled", "num_negatives": 1024, "item_updates": "rows"}
VARIANTS: dict[str, dict[str, Any]] = {
    "touched rows": ROW_WISE,
    "whole table": {**ROW_WISE, "item_updates": "all"},
    "full softmax": {"loss": "full"},
}
#: beyond this many items the variants for comparison take minutes a step or the memory of the machine
LARGEST = {"touched rows": 10**9, "whole table": 10**6, "full softmax": 10**5}


def batches(items: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches sorted by length, as the data module makes them."""
    generator = torch.Generator().manual_seed(0)
    weights = (1 / (10 + torch.arange(items, dtype=torch.float64)) ** 0.8).cumsum(0)
    made = []
    for number in range(count):
        length = 2 + number % 12 if number % 10 else LENGTH  # median 6 to 8, a tail up to L
        points = torch.rand(ROWS, length + 1, dtype=torch.float64, generator=generator) * weights[-1]
        ids = torch.searchsorted(weights, points).clamp_(max=items - 1) + 1
        made.append({"history": ids[:, :-1], "targets": ids[:, 1:], "user": torch.arange(ROWS)})
    return made


def measure(items: int, rounds: int, steps: int) -> dict[str, Any]:
    """CPU seconds an epoch by variant, and the peak memory of the variant to be used."""
    from lightning_sfubm.contracts import Catalogue
    from lightning_sfubm.modules.encoders.sasrec import SASRec
    from lightning_sfubm.modules.sequential import SequentialRecommender

    torch.set_num_threads(1)
    counts = torch.ones(items + 1, dtype=torch.long)
    counts[1:] = (1000 * (1 / (10 + torch.arange(items)) ** 0.8)).long()
    catalogue = Catalogue("benchmark", items, [], None, counts)
    result: dict[str, Any] = {"items": items, "epoch_cpu_s": {}}
    data = batches(items, steps)
    targets = sum(batch["targets"].numel() for batch in data)
    seconds: dict[str, list[float]] = {}
    trainers = {}
    for name, settings in VARIANTS.items():
        if items > LARGEST[name]:
            continue
        torch.manual_seed(0)
        module = SequentialRecommender(SASRec(hidden_dim=64), **settings).train()
        module.bind(catalogue)
        module.log_losses = lambda *args, **kwargs: None  # type: ignore[method-assign]
        trainers[name] = (module, module.configure_optimizers())
        seconds[name] = []
        _epoch(*trainers[name], data[:3])
        if name == "touched rows":
            _epoch(*trainers[name], data)
            result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2)
    for _ in range(rounds):
        for name, (module, optimizer) in trainers.items():
            start = time.process_time()
            _epoch(module, optimizer, data)
            seconds[name].append((time.process_time() - start) * TARGETS / targets)
    result["epoch_cpu_s"] = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    result["parameters"] = sum(p.numel() for p in trainers["touched rows"][0].parameters())
    return result


def _epoch(module: Any, optimizer: Any, data: list[dict[str, torch.Tensor]]) -> None:
    for batch in data:
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds, arguments.steps)))
        return
    from lightning_sfubm.evaluation.environment import environment

    rows = []
    for items in arguments.items:
        command = [sys.executable, __file__, "--measure", str(items)]
        command += ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        rows[-1]["ratio"] = round(rows[-1]["epoch_cpu_s"]["touched rows"] / rows[0]["epoch_cpu_s"]["touched rows"], 2)
        print(rows[-1])
    result = {"rows": rows, "limits": LIMITS, "load_average": os.getloadavg()[0], "environment": environment()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
