"""Privacy beside utility on real domains: what attacks find and what recommendations are worth, by epsilon and by sigma.

    python benchmarks/privacy_curves.py --data-root DIR [--users 1200] [--publish]

DIR holds one folder a domain (``beauty``, ``health``), as for configs/experiment/health_beauty.yaml. Every run is a federation
of the two with recorded messages, audited as ``lightning-sfubm audit`` does. Half of the users of a domain train, the
others are the non-members; test figures are over both.

- by epsilon: teacher weights exchanged, trained without and with user-level differential privacy. Attacked is the last
  aggregated teacher, which every client receives. The teacher's utility is that of the same weights, the student's that of the
  client after its local phases, which are not exchanged and need no noise.
- by sigma: perturbed item vectors exchanged, nothing else.

Writes benchmarks/results/privacy_curves.json, and with ``--publish`` the figures to docs/images/. Finished runs below ``--out``
are not run again where they are of the same settings and the same data.
"""

import argparse
import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_sfubm.audit.attack import AuditSettings
from lightning_sfubm.audit.command import audit_run
from lightning_sfubm.audit.curve import curve_points
from lightning_sfubm.audit.plots import epsilon_plot, sigma_plot
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.datamodules.text import HFTextEncoder
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.evaluation.evaluate import evaluate_ranker
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.loop import FederatedLoop, Federation
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.training import Stopwatch

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "privacy_curves.json"
IMAGES = ROOT.parent / "docs" / "images"
DOMAINS = ("beauty", "health")
#: what a single run does not depend on; of the data its content counts, not where it lies
NOT_OF_A_RUN = ("data_root", "epsilons", "sigmas", "out", "publish")


def evaluate(loop: FederatedLoop, method: str) -> None:
    """Rank the test candidates of every client with its module as it stands, as a row of the run's results."""
    for name, client in loop.clients.items():
        data: Any = client.datamodule
        module: Any = client.module
        evaluate_ranker(
            module,
            data.test_dataloader(),
            catalogue=data.catalogue,
            method=method,
            domain=name,
            split="test",
            seed=loop.seed,
            candidate_hash=data.candidate_hash["test"],
            full=False,
            progress=False,
        ).save(loop.run_dir / "results" / name / f"{method}.parquet")


class SharedTeacher(FederatedCallback):
    """Evaluate the teacher that all clients hold after the last round, before they train on alone."""

    def on_round_end(self, loop: FederatedLoop, round: int, metrics: dict[str, dict[str, float]]) -> None:
        """Runs when every client has received the last aggregated teacher."""
        if round == loop.federation.rounds:
            evaluate(loop, "teacher")


def data(options: argparse.Namespace) -> FederatedDataModule:
    """The domains, half of whose users train."""
    domains = {
        name: DomainDataModule(
            name,
            TableReader(folder=name),
            text_encoder=HFTextEncoder(model="minilm"),
            max_users=options.users,
            train_users=options.users // 2,
            max_length=20,
            max_eval_users=500,
            seed=options.seed,
        )
        for name in DOMAINS
    }
    return FederatedDataModule(domains, root=str(options.data_root))


def model() -> FKDDistiller:
    """Small, and without dropout: a teacher that can remember its users where nothing keeps it from it."""
    encoder = SASRec(hidden_dim=64, num_layers=1, num_heads=2, max_length=20, dropout=0.0)
    return FKDDistiller(encoder, num_experts=1, lr=3e-3)


def run_key(options: argparse.Namespace) -> str:
    """Of the settings and the data of a run, so that a run of others is never taken for it."""
    chosen = {name: value for name, value in vars(options).items() if name not in NOT_OF_A_RUN}
    sources = {name: domain.source_fingerprint() for name, domain in data(options).domains.items()}
    return hashlib.sha256(json.dumps([chosen, sources], sort_keys=True).encode()).hexdigest()[:12]


def run(options: argparse.Namespace, name: str, exchange: Any, callbacks: list[Any]) -> Path:
    """One federation with its audit; returns the run's folder, whose name tells the settings apart."""
    run_dir: Path = options.out / f"{name}_{run_key(options)}"
    if (run_dir / "audit.json").is_file():
        return run_dir
    shutil.rmtree(run_dir, ignore_errors=True)

    def trainer() -> FederatedTrainer:
        L.seed_everything(options.seed, verbose=False)
        return FederatedTrainer(
            federation=Federation(
                rounds=options.rounds,
                local_epochs=options.local_epochs,
                exchange=exchange,
                local_max_epochs=12,
                local_min_epochs=2,
                patience=2,
                keep_messages=True,
            ),
            default_root_dir=run_dir,
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[*callbacks, SharedTeacher()],
            limit_val_batches=1,
        )

    federated, watch = trainer(), Stopwatch()
    with watch("run"):
        federated.fit(model(), datamodule=data(options))
        assert federated.loop is not None
        evaluate(federated.loop, "stage1")
    again = trainer()
    with watch("audit"):
        settings = AuditSettings(shadows=options.shadows, max_users=options.users, seed=options.seed)
        audit_run(again, again.build_loop(model(), data(options)), settings)
    spent = ", ".join(f"{part} {entry['cpu_s']:.0f} CPU-s" for part, entry in watch.timings.items())
    print(f"{name}: {spent}", flush=True)
    return run_dir


def private(options: argparse.Namespace, epsilon: float) -> list[Any]:
    """The callback for a target epsilon; none where it is infinite."""
    if math.isinf(epsilon):
        return []
    return [
        DifferentialPrivacy(
            target_epsilon=epsilon,
            total_epochs=options.rounds * options.local_epochs,
            delta=0.1 / (options.users // 2),
            expected_batch_size=options.batch,
            accounting="rdp",
        )
    ]


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--users", type=int, default=1200, help="users a domain, half of whom train")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256, help="expected users a private step")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[math.inf, 32, 8, 2, 0.5])
    parser.add_argument("--sigmas", type=float, nargs="*", default=[0.0, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--shadows", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/privacy_curves"))
    parser.add_argument("--publish", action="store_true", help="write the figures to docs/images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    epsilon_runs = [run(options, f"epsilon_{e:g}", "teacher", private(options, e)) for e in options.epsilons]
    sigma_runs = [run(options, f"sigma_{s:g}", "semantics", [PrivacyNoise(s)]) for s in options.sigmas]
    by_epsilon, by_sigma = curve_points(epsilon_runs), curve_points(sigma_runs)
    result = {
        "environment": environment(),
        "command": f"python benchmarks/privacy_curves.py --data-root DIR --users {options.users}",
        "settings": {
            name: value for name, value in vars(options).items() if name not in ("data_root", "out", "publish")
        },
        "contradictions": contradictions(by_epsilon),
        "by_epsilon": by_epsilon,
        "by_sigma": by_sigma,
    }
    RESULTS.write_text(json.dumps(result, indent=1, default=str).replace("Infinity", "null") + "\n")
    if options.publish:
        for name, figure in (("privacy_epsilon", epsilon_plot(by_epsilon)), ("privacy_sigma", sigma_plot(by_sigma))):
            if figure is not None:
                figure.savefig(IMAGES / f"{name}.png", dpi=110)
    show(by_epsilon, by_sigma)
    print("contradictions:", "; ".join(result["contradictions"]) or "none")


def contradictions(points: list[dict[str, Any]]) -> list[str]:
    """What the curve should show and does not: success without noise, chance at the smallest epsilon."""
    found = []
    for domain in sorted({point["domain"] for point in points}):
        line = [point for point in points if point["domain"] == domain]
        for score in ("loss", "calibrated"):
            loosest, tightest = (point["membership"].get(score, {}).get("auc") for point in (line[0], line[-1]))
            if loosest and loosest["low"] <= 0.5:
                found.append(f"{domain}, {score}: at chance at the largest epsilon")
            if tightest and not tightest["low"] <= 0.5 <= tightest["high"]:
                found.append(f"{domain}, {score}: not at chance at the smallest epsilon")
    return found


def show(by_epsilon: list[dict[str, Any]], by_sigma: list[dict[str, Any]]) -> None:
    """Print the curves."""
    for point in by_epsilon:
        areas = {score: row["auc"] for score, row in point["membership"].items()}
        words = [f"AUC {score} {a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]" for score, a in areas.items()]
        rate = point["membership"]["loss"]["tpr"]
        print(point["domain"], f"epsilon {point['epsilon']}", *words, f"TPR {rate['value']:.3f}", utility(point))
    for point in by_sigma:
        linked = point["linkage"]
        share, cosine = linked["with_replacement"]["value"], linked["cosine_mean"]
        print(point["domain"], f"sigma {point['sigma']:g}", f"linked {share:.3f} cosine {cosine:.3f}", utility(point))


def utility(point: dict[str, Any]) -> str:
    """Hit@1 and NDCG@10 of both branches in words."""
    return ", ".join(
        f"{branch} {metric} {estimate['value']:.3f}"
        for branch, metrics in point["utility"].items()
        for metric, estimate in metrics.items()
    )


if __name__ == "__main__":
    main()
