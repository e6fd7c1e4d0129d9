"""What a federation of many clients costs, and the server's work at full size.

    python benchmarks/federated.py [--only clients participants workers secure knn_mix kmeans epsilon] [--out FILE]

Each part runs in a process of its own, so that its peak memory is its own, and adds to benchmarks/results/federated.json.
Wall time depends on what else the machine does; CPU seconds are beside it. Limits: 200 clients, 10 rounds of 20, under 300 s
and 3 GB on 2 cores; secure aggregation of 1 M parameters from 10 clients under 5 s; 2 x 100,000 x 384 item vectors in
under 60 s and 2 GB; epsilon never below the true one, by PRV at most .012 above it.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "federated.json"
CLIENTS, ROUNDS, TAKING_PART = 200, 10, 20
#: noise multiplier, sample rate, steps, delta
GRID = [(1.0, 0.01, 1000, 1e-5), (1.5, 0.04, 2250, 1e-5), (0.8, 0.001, 10000, 1e-6), (2.0, 0.2, 500, 1e-5)]
GRID += [(4.0, 0.5, 100, 1e-5), (10.0, 0.3, 2000, 1e-7)]
GRID += [(50.0, 1.0, 5, 1e-5), (1.5, 1.0, 1, 1e-7), (3.0, 1.0, 10, 1e-6), (0.8, 1.0, 1, 1e-5), (5.0, 1.0, 50, 1e-5)]
GRID += [(4.0, 1.0, 100, 1e-5)]
#: PRV's stated error is .01 in epsilon, and a thousandth of delta. RDP is a bound, loosest where few are sampled.
EPSILON_LIMIT = {"prv_above": (0.0, 0.012), "rdp_over": (1.0, 2.0)}


def federation(folder: Path, clients: int, rounds: int, taking_part: int, phases: bool) -> tuple[Any, Any, Any]:
    """Trainer, model and data of tiny clients: 40 users and 72 items each, a SASRec of width 16."""
    import torch

    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
    from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
    from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
    from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
    from lightning_sfubm.federated.loop import Federation
    from lightning_sfubm.federated.trainer import FederatedTrainer
    from lightning_sfubm.modules.encoders.sasrec import SASRec
    from lightning_sfubm.modules.fkd import FKDDistiller

    encoder = HashingTextEncoder(dim=32)
    data = FederatedDataModule(
        {
            name: DomainDataModule(
                name,
                SyntheticReader(number, num_users=40, num_items=72, mean_length=9),
                text_encoder=encoder,
                k_core=0,
                batch_size=16,
                max_length=16,
            )
            for number, name in enumerate(f"client-{n:03d}" for n in range(clients))
        }
    )

    class RoundsOnly(FKDDistiller):
        local_phases = ()  # type: ignore[assignment]

    torch.manual_seed(0)
    module = (FKDDistiller if phases else RoundsOnly)(
        SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=16), num_experts=2
    )
    settings = {"exchange": "both", "local_max_epochs": 1, "local_min_epochs": 1, "patience": 1}
    trainer = FederatedTrainer(
        federation=Federation(rounds=rounds, participation=taking_part / clients, **settings),  # type: ignore[arg-type]
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[PrivacyNoise(0.05)],
    )
    return trainer, module, data


def run_clients(clients: int, rounds: int, taking_part: int, phases: bool = True) -> dict[str, Any]:
    """A federated fit: set-up, exchange, rounds and, where wanted, two local phases of one epoch for every client."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SFUBM_CACHE"] = f"{folder}/cache"
        trainer, module, data = federation(Path(folder) / "run", clients, rounds, taking_part, phases)
        start, cpu = time.perf_counter(), time.process_time()
        trainer.fit(module, datamodule=data)
        timings = trainer.loop.stopwatch.timings
        written = sum(file.stat().st_size for file in (Path(folder) / "run").rglob("*") if file.is_file())
        return {
            "clients": clients,
            "rounds": rounds,
            "taking_part": taking_part,
            "wall_s": round(time.perf_counter() - start, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "states_written": trainer.loop.counters.step,
            "run_folder_mb": round(written / 1e6, 1),
            "parts": {name: {k: round(v, 2) for k, v in entry.items()} for name, entry in timings.items()},
        }


def part_clients() -> dict[str, Any]:
    """200 clients, 10 rounds, 20 of them in each."""
    return {**run_clients(CLIENTS, ROUNDS, TAKING_PART), "limit": {"wall_s": 300, "peak_gb": 3}}


def run_pair(workers: int) -> dict[str, float]:
    """Two equal silos from raw data to their last phase, one after the other or side by side, one thread each."""
    import torch

    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
    from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
    from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
    from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
    from lightning_sfubm.federated.loop import Federation
    from lightning_sfubm.federated.trainer import FederatedTrainer
    from lightning_sfubm.modules.encoders.sasrec import SASRec
    from lightning_sfubm.modules.fkd import FKDDistiller

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SFUBM_CACHE"] = f"{folder}/cache"
        start = time.perf_counter()
        domains = {
            name: DomainDataModule(
                name,
                SyntheticReader(number, num_users=2500, num_items=5000, mean_length=12),
                text_encoder=HashingTextEncoder(dim=384),
                batch_size=128,
            )
            for number, name in enumerate(("one", "two"))
        }
        settings: dict[str, Any] = {"local_max_epochs": 25, "local_min_epochs": 25, "patience": 25}
        trainer = FederatedTrainer(
            federation=Federation(rounds=3, exchange="both", workers=workers, **settings),
            default_root_dir=Path(folder) / "run",
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[PrivacyNoise(0.05)],
        )
        data = FederatedDataModule(domains)
        trainer.prepare(FKDDistiller(SASRec(hidden_dim=64, num_layers=2, num_heads=2)), data)
        assert trainer.loop is not None
        trainer.loop.run()
        return {"wall_s": round(time.perf_counter() - start, 1)}


def part_workers() -> dict[str, Any]:
    """Two clients one after the other and in two worker processes, in turn, twice; the start of the workers counts."""
    runs = []
    for workers in (0, 2, 0, 2):
        # A fresh process each: the second run with workers would find them imported already.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            runs.append({"workers": workers, **fresh.submit(run_pair, workers).result()})
    alone, beside = (sum(run["wall_s"] for run in runs if run["workers"] == n) for n in (0, 2))
    return {"runs": runs, "speed_up": round(alone / beside, 2), "limit": {"speed_up": 1.6}}


def part_participants() -> dict[str, Any]:
    """CPU seconds a round by the number of participants, of 40 clients: training, messages, states."""
    rows = []
    for count in (5, 10, 20, 40):
        parts = run_clients(40, 3, count, phases=False)["parts"]
        spent = sum(entry["cpu_s"] for name, entry in parts.items() if "semantics" not in name)
        rows.append({"taking_part": count, "cpu_s_a_round": round(spent / 3, 3)})
    for row in rows:
        row["cpu_s_a_participant"] = round(row["cpu_s_a_round"] / row["taking_part"], 4)
    return {"clients": 40, "rows": rows}


def part_secure() -> dict[str, Any]:
    """The mean of 1 M parameters of 10 clients, all roles in one process."""
    import torch

    from lightning_sfubm.federated.secure import SecureAggregation

    generator = torch.Generator().manual_seed(0)
    updates = {f"client-{n}": {"w": torch.randn(1000, 1000, generator=generator)} for n in range(10)}
    sent = 0

    def record(client: str, direction: str, step: str, payload: bytes) -> None:
        nonlocal sent
        sent += len(payload)

    start, cpu = time.perf_counter(), time.process_time()
    mean = SecureAggregation().mean(1, updates, None, record)["w"]
    wall, spent = time.perf_counter() - start, time.process_time() - cpu
    plain = torch.stack([u["w"].double() for u in updates.values()]).mean(0)
    error = float((mean.double() - plain).abs().max())
    return {
        "clients": 10,
        "parameters": 1_000_000,
        "wall_s": round(wall, 2),
        "cpu_s": round(spent, 2),
        "traffic_mb": round(sent / 1e6, 1),
        "largest_error": error,
        "limit": {"wall_s": 5},
    }


def _aggregation(aggregator: Any) -> dict[str, Any]:
    import torch
    from torch.nn.functional import normalize

    generator = torch.Generator().manual_seed(0)
    uploads = {n: normalize(torch.randn(100_000, 384, generator=generator), dim=1) for n in ("a", "b")}
    start, cpu = time.perf_counter(), time.process_time()
    views = aggregator.aggregate(uploads)
    assert sorted(views) == ["a", "b"]
    return {
        "vectors": "2 x 100,000 x 384, random",
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "limit": {"wall_s": 60, "peak_gb": 2},
    }


def part_knn_mix() -> dict[str, Any]:
    """KNNMix at its defaults."""
    from lightning_sfubm.federated.aggregation import KNNMix

    return _aggregation(KNNMix())


def part_kmeans() -> dict[str, Any]:
    """KMeans at its defaults: 256 clusters."""
    from lightning_sfubm.federated.aggregation import KMeans

    return _aggregation(KMeans())


def exact_epsilon(noise: float, steps: int, delta: float) -> float:
    """Epsilon of steps that take everybody: one Gaussian release with sqrt(steps) times the sensitivity."""
    from lightning_sfubm.privacy.gaussian import gaussian_delta

    def too_small(epsilon: float) -> bool:
        return gaussian_delta(epsilon, noise, math.sqrt(steps)) > delta

    low, high = 0.0, 1.0
    while too_small(high):
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


def pld_epsilon(noise: float, rate: float, steps: int, delta: float) -> float | None:
    """Epsilon by the privacy loss distributions of dp-accounting, which shares no code with Opacus; none without it."""
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return None
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return float(PLDAccountant().compose(step, steps).get_epsilon(delta))


def part_epsilon() -> dict[str, Any]:
    """Our accountant, whose arithmetic is Opacus', beside epsilons that Opacus has no part in.

    Without sampling the exact epsilon is known. With sampling dp-accounting gives it, where that is installed.
    """
    import warnings
    from importlib.metadata import PackageNotFoundError, version

    from lightning_sfubm.privacy.accounting import PrivacyAccountant

    warnings.simplefilter("ignore")
    try:
        other = version("dp-accounting")
    except PackageNotFoundError:
        other = "not installed"
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, list[float]]] = {name: {} for name in EPSILON_LIMIT}
    for noise, rate, steps, delta in GRID:
        ours = {}
        for mechanism in ("prv", "rdp"):
            accountant = PrivacyAccountant(mechanism)  # type: ignore[arg-type]
            accountant.step(noise, rate, steps)
            ours[mechanism] = accountant.epsilon(delta)
        known = {"exact": exact_epsilon(noise, steps, delta) if rate == 1 else None}
        known["pld"] = pld_epsilon(noise, rate, steps, delta)
        rows.append({"noise": noise, "rate": rate, "steps": steps, "delta": delta, **ours, **known})
        for name, epsilon in known.items():
            if epsilon is not None:
                found["prv_above"].setdefault(name, []).append(ours["prv"] - epsilon)
                found["rdp_over"].setdefault(name, []).append(ours["rdp"] / epsilon)
    ranges = {what: {name: [min(v), max(v)] for name, v in of.items()} for what, of in found.items()}
    bounds = [(EPSILON_LIMIT[what], found) for what, of in ranges.items() for found in of.values()]
    met = all(least <= low and high <= most for (least, most), (low, high) in bounds)
    return {"rows": rows, "dp_accounting": other, **ranges, "limit": EPSILON_LIMIT, "met": met}


PARTS = {
    "clients": part_clients,
    "participants": part_participants,
    "workers": part_workers,
    "secure": part_secure,
    "knn_mix": part_knn_mix,
    "kmeans": part_kmeans,
    "epsilon": part_epsilon,
}


def measure(name: str) -> dict[str, Any]:
    """Run one part in this process."""
    from lightning_sfubm.evaluation.environment import environment

    load = os.getloadavg()[0]
    result = PARTS[name]()
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result["peak_gb"] = round(max(peaks) / 1024**2, 2)  # of the largest process
    result["load_average"] = {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)}
    result["environment"] = environment()
    return result


def table(results: dict[str, Any]) -> str:
    """What was measured beside its limit."""
    lines = [f"{'part':13} {'wall s':>8} {'CPU s':>8} {'peak GB':>8}  limit"]
    for name, row in results.items():
        if "wall_s" in row:
            lines.append(f"{name:13} {row['wall_s']:8} {row['cpu_s']:8} {row['peak_gb']:8}  {row['limit']}")
    for row in results.get("participants", {}).get("rows", []):
        lines.append(f"  {row['taking_part']:3} taking part: {row['cpu_s_a_round']} CPU s a round")
    if "workers" in results:
        lines.append(
            f"  two clients in two worker processes: {results['workers']['speed_up']} times as fast (limit 1.6)"
        )
    epsilon = results.get("epsilon", {})
    for key, limit in epsilon.get("limit", {}).items():
        for name, (low, high) in epsilon[key].items():
            lines.append(f"  epsilon, {key} {name}: {low:.4f} to {high:.4f} (limit {limit[0]:g} to {limit[1]:g})")
    return "\n".join(lines)


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.only:
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
