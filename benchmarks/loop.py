"""What the federated loop itself costs: everything that is not a client's epochs (training and validation).

    python benchmarks/loop.py --config configs/experiment/demo.yaml [--data.root DIR]

Runs stage 1 of an experiment once and writes benchmarks/results/loop.json: CPU seconds inside the clients' epochs, CPU
seconds of the whole loop (trainers, messages, aggregation, checkpoints, ledger included), and the share that is left.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_sfubm.cli import SFUBMCLI
from lightning_sfubm.evaluation.environment import environment

RESULTS = Path(__file__).parent / "results" / "loop.json"
LIMIT = 0.05


class EpochTime(Callback):
    """CPU seconds between the start and the end of every epoch of every client, validation included."""

    total = 0.0  # on the class: each client's trainer gets a copy of the callback

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this after the epoch's validation."""
        EpochTime.total += time.process_time() - self.started


class Parsed(SFUBMCLI):
    """Parses and builds, and leaves the running to the benchmark."""

    def before_fit(self) -> None:
        """Nothing is written."""

    def fit(self, **kwargs: Any) -> None:
        """Nothing is run."""


def main() -> None:
    """Command line; see the head of this file."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false"]
        cli = Parsed(args=["fit", *sys.argv[1:], *quiet])
        trainer = cli.trainer
        trainer.flags.callbacks.append(EpochTime())
        loop = trainer.build_loop(cli.model, cli.datamodule)
        started = time.process_time()
        loop.run()
        total = time.process_time() - started
    share = 1 - EpochTime.total / total
    timings = {name: round(entry["cpu_s"], 3) for name, entry in loop.stopwatch.timings.items()}
    result = {
        "environment": environment(),
        "command": "python benchmarks/loop.py " + " ".join(sys.argv[1:]),
        "epochs_cpu_s": EpochTime.total,
        "loop_cpu_s": total,
        "overhead_share": share,
        "limit": LIMIT,
        "timings_cpu_s": timings,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"clients' epochs {EpochTime.total:.1f} CPU-s, whole loop {total:.1f}: overhead {share:.1%} (limit {LIMIT:.0%})"
    )


if __name__ == "__main__":
    main()
