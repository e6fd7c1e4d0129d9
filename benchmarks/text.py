"""Speed of encoding item titles, and what a kill costs: `python benchmarks/text.py [--data-root DIR] [--quick]`.

(a) The product's sentence encoder against a bare transformers loop on the same titles: sorted by length, batches of 64, mean
of the last states, normalised; in bf16 weights and under bf16 autocast, the faster one counts. Tokenisation is part of both.
Titles of Amazon Beauty with --data-root (a folder that holds beauty/), else generated ones. (b) A child process encodes
distinct titles into the cache and is killed half way; a second call tells how many it had to encode again. One thread, CPU
seconds, rounds in turn, medians. Writes benchmarks/results/text.json.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.assets import resolve_model
from lightning_sfubm.datamodules.text import HFTextEncoder, encode_cached
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.seeds import torch_generator

RESULTS = Path(__file__).parent / "results" / "text.json"
LIMIT = 0.9
BATCH = 64
WORDS = (
    "cream",
    "night",
    "gel",
    "hair",
    "brush",
    "red",
    "oil",
    "face",
    "natural",
    "serum",
    "care",
    "matte",
    "lip",
    "soft",
)


def generated(count: int) -> list[str]:
    """Distinct titles of 6 to 14 words."""
    picks = torch.randint(len(WORDS), (count, 14), generator=torch_generator(0, "titles")).tolist()
    return [" ".join(WORDS[p] for p in row[: 6 + n % 9]) + f" {n}" for n, row in enumerate(picks)]


def real(root: str, count: int) -> list[str]:
    """Titles of Beauty, a seeded draw."""
    from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
    from lightning_sfubm.datamodules.readers.table import TableReader

    data = DomainDataModule("beauty", TableReader("beauty"), root=root)
    data.prepare_data()
    data.setup()
    titles = [title for title in data.catalogue.titles[1:] if title.strip()]
    order = torch.randperm(len(titles), generator=torch_generator(0, "titles")).tolist()
    return [titles[index] for index in order[:count]]


class Bare:
    """The loop a user would write."""

    def __init__(self, weights: torch.dtype) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = resolve_model("minilm")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = AutoModel.from_pretrained(folder, dtype=weights).eval()
        self.autocast = weights == torch.float32

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, D) in the order given."""
        encoded = self.tokenizer(texts, truncation=True, max_length=128)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
        vectors = torch.empty(len(texts), self.network.config.hidden_size)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
                states = self.network(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            vectors[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return vectors


def speed(texts: list[str], rounds: int) -> dict[str, Any]:
    """Titles a CPU second of each loop."""
    ours = HFTextEncoder("minilm")
    calls = {"product": ours.encode, "bare, bf16 weights": Bare(torch.bfloat16), "bare, autocast": Bare(torch.float32)}
    part = -(-len(texts) // rounds)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    vectors = {name: call(texts[:BATCH]) for name, call in calls.items()}  # warms up
    for turn in range(rounds):
        mine = texts[turn * part : (turn + 1) * part]
        for name, call in calls.items():
            start = time.process_time()
            call(mine)
            seconds[name].append((time.process_time() - start) / len(mine))
    faster = min(("bare, bf16 weights", "bare, autocast"), key=lambda name: statistics.median(seconds[name]))
    pairs = zip(seconds[faster], seconds["product"], strict=True)
    return {
        "titles": len(texts),
        "rounds": rounds,
        "bf16": ours.bf16,
        "titles_per_cpu_s": {name: round(1 / statistics.median(values), 1) for name, values in seconds.items()},
        "compared_with": faster,
        "ratio": round(statistics.median(bare / product for bare, product in pairs), 3),
        "largest_difference": float((vectors["product"] - vectors["bare, autocast"]).abs().max()),
    }


def encode_all(count: int) -> None:
    """Encode the generated titles into the cache; says at its end how many texts the encoder was given."""
    encoder, given = HFTextEncoder("minilm"), 0
    plain = encoder.encode

    def counted(texts: list[str]) -> Tensor:
        nonlocal given
        given += len(texts)
        return plain(texts)

    encoder.encode = counted  # type: ignore[method-assign]
    encode_cached(encoder, generated(count), progress=False)
    print(json.dumps({"encoded": given, "cpu_s": round(time.process_time(), 1)}))


def killed_half_way(count: int) -> dict[str, Any]:
    """What was kept when the process was killed, and what the next one encoded."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "SFUBM_CACHE": folder}
        _share_models(Path(folder))
        command = [sys.executable, __file__, "--encode", str(count)]
        child = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL)
        wanted = count // 2048 // 2
        while len(list(Path(folder).glob("text/*/*.npz"))) < wanted and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept = 2048 * len(list(Path(folder).glob("text/*/*.npz")))
        output = subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE, text=True).stdout
        second = json.loads(output.splitlines()[-1])
    return {
        "titles": count,
        "kept_by_the_killed": kept,
        "encoded_by_the_next": second["encoded"],
        "cpu_s": second["cpu_s"],
    }


def _share_models(folder: Path) -> None:
    from lightning_sfubm.assets import cache_dir

    (folder / "models").symlink_to(cache_dir() / "models")


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder that holds beauty/")
    parser.add_argument("--sample", type=int, default=6000, help="titles of the comparison")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--titles", type=int, default=100_000, help="titles of the killed run")
    parser.add_argument("--quick", action="store_true", help="256 and 8,192 titles, 2 rounds, nothing is written")
    parser.add_argument("--encode", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.encode:
        encode_all(arguments.encode)
        return
    if arguments.quick:
        arguments.sample, arguments.rounds, arguments.titles = 256, 2, 8192
    texts = real(arguments.data_root, arguments.sample) if arguments.data_root else generated(arguments.sample)
    result = {
        "texts": "Amazon Beauty" if arguments.data_root else "generated",
        **speed(texts, arguments.rounds),
        "killed": killed_half_way(arguments.titles),
        "limit": LIMIT,
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
