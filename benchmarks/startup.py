"""Seconds until the program answers: `lightning-sfubm --help` whole, `fit` on the demo up to its first training step.

    python benchmarks/startup.py [--repeats 5]

The models and the prepared data are cached, as after a first run. Writes benchmarks/results/startup.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

RESULTS = Path(__file__).parent / "results" / "startup.json"
ROOT = Path(__file__).parents[1]
LIMITS = {"help_wall_s": 1.5, "first_step_wall_s": 10.0}
_NOTE = "SFUBM_FIRST_STEP"  # file that says when the first step began


class FirstStep(Callback):
    """Note when the first training step begins, and end the program there."""

    def on_train_batch_start(self, *_: Any) -> None:
        """The data are there, the model is built, the batch is made."""
        Path(os.environ[_NOTE]).write_text(str(time.time()))
        os._exit(0)


def timed(arguments: list[str], note: Path | None = None) -> dict[str, float]:
    """Wall seconds to the end of a call, or to the note it leaves, and the CPU seconds of its process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    if note is not None:
        note.unlink(missing_ok=True)
        environment[_NOTE] = str(note)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    command = [sys.executable, "-m", "lightning_sfubm", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    end, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if note is not None:
        end = float(note.read_text())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(end - start, 2), "cpu_s": round(cpu, 2)}


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from lightning_sfubm.evaluation.environment import environment

    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--config", "configs/experiment/demo.yaml", "--trainer.default_root_dir", f"{folder}/run"]
        fit += ["--trainer.callbacks+", "startup.FirstStep"]
        timed(fit, Path(folder) / "note")  # fills the caches
        helps = [timed(["--help"]) for _ in range(repeats)]
        steps = [timed(fit, Path(folder) / "note") for _ in range(repeats)]
    result: dict[str, Any] = {"limits": LIMITS, "load_average": os.getloadavg()[0], "environment": environment()}
    for name, runs in (("help", helps), ("first_step", steps)):
        for unit in ("wall_s", "cpu_s"):
            result[f"{name}_{unit}"] = statistics.median(run[unit] for run in runs)
        result[f"{name}_runs"] = runs
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"--help: {result['help_wall_s']} s (limit 1.5); first step of fit: {result['first_step_wall_s']} s (limit 10)"
    )


if __name__ == "__main__":
    main()
