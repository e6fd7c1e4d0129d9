"""Where a result comes from: versions, hardware, commit, time."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_sfubm.precision import has_fast_bf16

_PACKAGES = ("lightning-sfubm", "torch", "lightning", "transformers", "peft", "torchmetrics", "datasets", "numpy")
_CODE = ("lightning_sfubm", "modules", "datamodules", "callbacks")  #: where a checkout has its code


def environment() -> dict[str, Any]:
    """Versions, hardware, commit and time as JSON values; what cannot be found out is left out or ``"unknown"``."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "hardware": hardware(),
        "commit": commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, threads, vector instructions and accelerators."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": has_fast_bf16(torch.device("cpu")),  # decides what is computed in bf16, so figures depend on it
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def commit() -> str:
    """Commit of the checkout this package runs from, with ``+changes`` where files differ from it or its code has new ones."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=10
        )
        return answer.stdout.strip()

    try:
        # A package that is installed below somebody's repository, in an environment of it, is no part of that repository.
        head = git("ls-files", "environment.py") and git("rev-parse", "--short=12", "HEAD")
        if not head:
            return "unknown"
        new = git("ls-files", "--others", "--exclude-standard", *(f":/{part}/*.py" for part in _CODE))
        return f"{head}+changes" if new or git("status", "--porcelain", "-uno") else head
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
