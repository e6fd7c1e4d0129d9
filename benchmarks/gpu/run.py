"""What a card makes of the LLM stage and of stage 1: `python benchmarks/gpu/run.py [--models smollm2-135m 1b 7b]`.

The card's own limit first: the rate of a large bf16 matrix product. Then, for each model, tuning on `list` prompts (LoRA on
all linear layers, bf16, SDPA) in tokens of real text a second and as a share of that rate, and ranking 20 candidates in users
a second. Then epochs a second of SASRec. 1b and 7b have the shapes of Llama 3.2 1B and Llama 2 7B, vocabularies included, and
random weights, written to a temporary folder (2.5 and 13.5 GB); rates do not depend on the values. Writes
benchmarks/results/gpu.json. `--device cpu --models tiny` shows that it runs, and no more.

A step of LoRA tuning takes 4 floating-point operations for each frozen weight and token (forward, and the gradient by the
activations; frozen weights have none of their own). Attention, adapters and the logits, which are computed where words of an
answer are predicted and nowhere else, are not counted, so the share is a lower bound.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.errors import SFUBMError
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import torch_generator

RESULT = Path(__file__).parent.parent / "results" / "gpu.json"
ITEMS, CANDIDATES, HISTORY = 500, 20, 10
WORDS = ("The", "Story", "Night", "of", "River", "Stone", "Return", "Last", "Garden", "King", "House", "Summer")
#: Llama 3.2 1B and Llama 2 7B, without their weights; their tokenizer knows few of the words they have vectors for
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    },
    "7b": {
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "tiny": {"max_position_embeddings": 4096},
}

#: samples a step where 16 would not fit 80 GB: 16 of 500 tokens leave some 90 GB of activations at 7b, beside 13 GB of weights
#: (counted on one and two layers on a CPU)
ROWS = {"7b": 8}


def synchronised(device: torch.device) -> float:
    """The time, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device: torch.device, size: int) -> float:
    """Floating-point operations a second of a square bf16 product; the fastest of ten."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(10):
        start = synchronised(device)
        a @ b
        best = min(best, synchronised(device) - start)
    return 2.0 * size**3 / best


def catalogue() -> Catalogue:
    """Items with titles of five words."""
    picks = torch.randint(len(WORDS), (ITEMS, 5), generator=torch_generator(0, "titles")).tolist()
    titles = ["", *(" ".join(WORDS[p] for p in row) + f" ({1950 + i % 70})" for i, row in enumerate(picks))]
    return Catalogue("benchmark", ITEMS, titles, None, torch.zeros(ITEMS + 1, dtype=torch.long))


def batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Ranking samples of random users."""
    generator = torch_generator(seed, "batch")
    chosen = torch.stack([torch.randperm(ITEMS, generator=generator)[:CANDIDATES] + 1 for _ in range(rows)])
    return {
        "history": torch.randint(1, ITEMS + 1, (rows, HISTORY), generator=generator),
        "candidates": chosen,
        "target": chosen[:, 0],
        "target_index": torch.zeros(rows, dtype=torch.long),
        "user": torch.arange(rows),
    }


class StepTimer(L.Callback):
    """Seconds and real tokens of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = synchronised(pl_module.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it, and count the tokens that are no padding."""
        self.seconds.append(synchronised(pl_module.device) - self._start)
        prompts = pl_module.prompts.build(batch["history"], batch["candidates"], batch["target"].unsqueeze(1))
        self.tokens.append(int((prompts.branch >= 0).sum()))


def trainer(device: torch.device, steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    """A quiet trainer of one device."""
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=callbacks,
    )


def multiplied(head: LLMHead) -> int:
    """Frozen weights that every token is multiplied with: neither word vectors nor, where it has its own, the output matrix."""
    model = head.lm.causal_lm
    words = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(p.numel() for p in head.parameters() if not p.requires_grad and id(p) not in words)


def llm(name: str, device: torch.device, rows: int, steps: int, rate: float) -> dict[str, Any]:
    """Tuning and ranking with one model."""
    with tempfile.TemporaryDirectory() as folder:
        source = name
        if name in SHAPES:
            source = str(write_tiny_llm(folder, dtype=torch.bfloat16, **SHAPES[name]))
        head = LLMHead(source, form="list", template="movies", history_length=HISTORY)
        head.attach_stage1(None, catalogue())
        ranker = LLMHead(source, template="movies", history_length=HISTORY, tuning="frozen")
        ranker.attach_stage1(None, catalogue())
        weights = multiplied(head)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # else the peak is that of the largest model so far
    timer, batches = StepTimer(), [batch(rows, seed) for seed in range(steps)]
    trainer(device, steps, [timer]).fit(head, torch.utils.data.DataLoader(batches, batch_size=None))
    warm = slice(steps // 3, None)
    per_second = sum(timer.tokens[warm]) / sum(timer.seconds[warm])
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    del head
    ranker.to(device)
    return {
        "weights": weights,
        "rows_a_step": rows,
        "tokens_a_row": sum(timer.tokens) / len(timer.tokens) / rows,
        "tuning_tokens_per_s": per_second,
        "share_of_matrix_rate": 4.0 * weights * per_second / rate,
        "tuning_peak_gb": memory,
        "ranked_users_per_s": rows / timed(lambda: ranker.rank(on(batches[0], device)), device, 5),
    }


def on(samples: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Samples on a device."""
    return {name: value.to(device) for name, value in samples.items()}


def timed(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Median seconds of a call, after one to warm up."""
    work()
    seconds = []
    for _ in range(times):
        start = synchronised(device)
        work()
        seconds.append(synchronised(device) - start)
    return statistics.median(seconds)


def stage1(device: torch.device, users: int, epochs: int) -> dict[str, Any]:
    """Epochs a second of SASRec (d 64, 2 layers, L 50, whole-catalogue cross-entropy) on generated users."""
    reader = SyntheticReader(0, num_users=users, num_items=users // 2, mean_length=9)
    data = DomainDataModule("generated", reader, text_encoder=HashingTextEncoder(dim=32), batch_size=128)
    module = SequentialRecommender(SASRec(hidden_dim=64, num_layers=2, num_heads=2))
    data.prepare_data()
    data.setup("fit")
    module.bind(data.catalogue)
    fit = trainer(device, -1, [])
    fit.fit_loop.max_epochs = epochs
    start = synchronised(device)
    fit.fit(module, train_dataloaders=data.train_dataloader())
    return {"users": users, "items": data.catalogue.num_items, "epochs_per_s": epochs / (synchronised(device) - start)}


def write(path: Path, result: dict[str, Any]) -> None:
    """Store what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "1b", "7b"])
    parser.add_argument("--rows", type=int, default=16, help="samples a step, at most (7b: 8)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--users", type=int, default=22_000, help="of the generated data for stage 1")
    parser.add_argument("--matrix", type=int, default=8192, help="rows of the square product")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --models tiny shows that the script runs")
    rate = matrix_rate(device, arguments.matrix)
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)",
        "matrix_rate_bf16_flops": rate,
        "models": {},
    }
    result["environment"] = environment()
    failed = []
    for name in arguments.models:
        rows = min(arguments.rows, ROWS.get(name, arguments.rows))
        try:
            result["models"][name] = llm(name, device, rows, arguments.steps, rate)
        except (
            RuntimeError,
            OSError,
            SFUBMError,
        ) as error:  # too large, or not to be had: what was measured before it is kept
            result["models"][name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            failed.append(name)
        print(name, json.dumps(result["models"][name]), flush=True)
        write(arguments.out, result)
    result["stage1"] = stage1(device, arguments.users, epochs=3)
    write(arguments.out, result)
    print(json.dumps(result["stage1"]))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; the reasons stand in {arguments.out}")


if __name__ == "__main__":
    main()
