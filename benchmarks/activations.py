"""What `activation_checkpointing` saves and costs: `python benchmarks/activations.py --data-root DIR [--quick]`.

DIR holds beauty/. Steps of LLM tuning (SmolLM2-135M, all 30 layers, LoRA on q, k, v and o, batches of 8, the samples of
benchmarks/tuning.py) with and without, in turn, on the same batches, one thread. Memory is what the forward pass keeps for the
backward pass, frozen weights left out; with checkpointing one layer's share comes on top while it is computed again. Takes
about 6 minutes of CPU; writes benchmarks/results/activations.json.
"""

import argparse
import itertools
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor
from tuning import CANDIDATES, head_of, samples

from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.llm_head import LLMHead

RESULTS = Path(__file__).parent / "results" / "activations.json"


def step(head: LLMHead, batch: Any) -> tuple[float, float]:
    """CPU seconds of loss and gradients, and GB kept in between."""
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = head.loss(batch)
    loss.backward()
    spent = time.process_time() - start
    head.zero_grad()
    return spent, sum(kept.values()) / 1e9


def compare(form: str, root: str | None, layers: int | None, steps: int) -> dict[str, Any]:
    """Both ways over the same batches; the first step of each warms up."""
    data = samples(root, CANDIDATES[form])
    heads = {name: head_of(form, layers, data, again) for name, again in (("kept", False), ("computed again", True))}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in heads}
    for batch in itertools.islice(data.train_dataloader(), steps):
        for name, head in heads.items():
            head.train()
            taken[name].append(step(head, batch))
    kept, again = (taken[name][1:] for name in heads)
    return {
        "candidates": CANDIDATES[form],
        "steps": len(kept),
        "gb": {name: round(max(gb for _, gb in steps), 3) for name, steps in taken.items()},
        "gb_ratio": round(statistics.median(b[1] / a[1] for a, b in zip(kept, again, strict=True)), 3),
        "cpu_s": {name: round(statistics.median(s for s, _ in steps[1:]), 2) for name, steps in taken.items()},
        "cpu_s_ratio": round(statistics.median(b[0] / a[0] for a, b in zip(kept, again, strict=True)), 3),
    }


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder that holds beauty/")
    parser.add_argument("--steps", type=int, default=6, help="steps of each, the first to warm up")
    parser.add_argument("--quick", action="store_true", help="2 layers, 3 steps, nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    layers, steps = (2, 3) if arguments.quick else (None, arguments.steps)
    result: dict[str, Any] = {
        "prompts": "Amazon Beauty" if arguments.data_root else "generated",
        "backbone": "smollm2-135m",
        "batch_size": 8,
        "load_average": {"before": os.getloadavg()[0]},
    }
    for form in CANDIDATES:
        result[form] = compare(form, arguments.data_root, layers, steps)
    result["load_average"]["after"] = os.getloadavg()[0]
    result["environment"] = environment()
    print(json.dumps(result, indent=1))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
