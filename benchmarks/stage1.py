"""Speed and quality of SASRec and GRU4Rec with the full-catalogue loss on Amazon Beauty, on one thread.

    python benchmarks/stage1.py --data-root DIR        # DIR holds beauty/interactions.csv.gz and items.csv.gz

Prints a table and writes benchmarks/results/stage1.json. Times are CPU seconds; what is compared runs interleaved, and the
medians are reported, because other processes on the machine change every figure. Takes about 9 minutes of CPU.

Ours multiplies the catalogue in bf16 where the CPU has instructions for it. There the plain loop runs under bf16 autocast as
well as in fp32, and ours is compared with the faster of both.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.losses.precision import matmul_dtype
from lightning_sfubm.modules.sequential import SequentialRecommender

RESULTS = Path(__file__).parent / "results" / "stage1.json"
TARGETS = {
    "epoch_cpu_s": 6.0,
    "gru4rec_epoch_cpu_s": 7.0,
    "eval_users_per_cpu_s": 8000.0,
    "ndcg@10": 0.050,
    "peak_rss_gb": 1.0,
}


class PlainLoss(SequentialRecommender):
    """The same model with the loss written the usual way: all logits at once, autograd."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy at the positions that predict something."""
        table = self.items()
        predicting = batch["targets"] != 0
        logits = self.encode(batch["history"], table)[predicting] @ table.T
        logits[:, 0] = -torch.inf
        return F.cross_entropy(logits, batch["targets"][predicting])


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def make(
    data: DomainDataModule,
    cls: type[SequentialRecommender],
    encoder: type[nn.Module] = SASRec,
    autocast: bool = False,
    **settings: Any,
) -> Callable[[list[Any]], None]:
    """A function that trains one fresh model on a list of batches, under bf16 autocast where wanted."""
    torch.manual_seed(0)
    module = cls(encoder(), **settings)
    module.bind(data.catalogue)
    module.log_losses = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer: Any = module.configure_optimizers()
    module.train()

    def train(batches: list[Any]) -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = module.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def epoch_times(data: DomainDataModule, rounds: int, steps: int) -> dict[str, float]:
    """CPU seconds an epoch of each variant: ``steps`` steps of each in turn, ``rounds`` times, scaled to an epoch."""
    every = list(data.train_dataloader())
    total = sum(int((b["targets"] != 0).sum()) for b in every)
    variants = {
        "chunked, auto": make(data, SequentialRecommender),
        "chunked, fp32": make(data, SequentialRecommender, logits_precision="fp32"),
        "plain, fp32": make(data, PlainLoss),
        "GRU4Rec, chunked, auto": make(data, SequentialRecommender, GRU4Rec),
    }
    # Elsewhere ours is in fp32 too, and bf16 would be emulated.
    if matmul_dtype("auto", torch.device("cpu")) == torch.bfloat16:
        variants["plain, bf16 autocast"] = make(data, PlainLoss, autocast=True)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for train in variants.values():
        train(every[:3])
    for number in range(rounds):
        batches = list(islice(every, number * steps % (len(every) - steps), None))[:steps]
        targets = sum(int((b["targets"] != 0).sum()) for b in batches)
        for name, train in variants.items():
            times[name].append(cpu_seconds(partial(train, batches)) * total / targets)
    return {name: statistics.median(values) for name, values in times.items()} | {"targets": total}


def ratio_to_plain(epochs: dict[str, float]) -> float:
    """Ours over the plain loop in whichever of its number formats is the faster."""
    return epochs["chunked, auto"] / min(seconds for name, seconds in epochs.items() if name.startswith("plain"))


def floor(num_items: int, targets: int, rows: int = 320, hidden: int = 64) -> dict[str, float]:
    """CPU seconds of the three products and the one exponential an epoch cannot do without, by number format."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("auto", matmul_dtype("auto", torch.device("cpu")))):
        states, table = torch.randn(rows, hidden).to(dtype), torch.randn(num_items + 1, hidden).to(dtype)
        once = partial(_passes, states, table, torch.empty(num_items + 1, rows, dtype=dtype))
        once()
        found[name] = min(cpu_seconds(once) for _ in range(15)) * targets / rows
    return found


def _passes(states: torch.Tensor, table: torch.Tensor, block: torch.Tensor) -> None:
    torch.mm(table, states.T, out=block)
    torch.exp2(block, out=block)
    table.T @ block
    block @ states


def evaluate(data: DomainDataModule, module: SequentialRecommender) -> float:
    """Users per CPU second of the full-catalogue test evaluation, history masked, loading included."""
    module.eval()
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    users = 0

    def run() -> None:
        nonlocal users
        users = 0
        with torch.inference_mode():
            for batch in data.test_dataloader():
                module.test_step(batch, 0)
                users += len(batch["user"])

    seconds = statistics.median(cpu_seconds(run) for _ in range(3))
    return users / seconds


class StopAfter(L.Callback):
    """Stop at the end of the epoch in which the CPU seconds are spent; each epoch is timed from the end of the one before."""

    def __init__(self, seconds: float) -> None:
        self.end, self.ends = time.process_time() + seconds, [0.0]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first epoch begins."""
        self.ends = [time.process_time()]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.ends.append(time.process_time())
        trainer.should_stop = self.ends[-1] >= self.end

    @property
    def epochs(self) -> list[float]:
        """CPU seconds of each epoch."""
        return [end - start for start, end in pairwise(self.ends)]


def train_for(
    data: DomainDataModule, seconds: float, module: SequentialRecommender
) -> tuple[SequentialRecommender, dict[str, Any]]:
    """Train by the Trainer for some CPU seconds, the start of the items included, without validation, then test once."""
    L.seed_everything(1, verbose=False)
    stop = StopAfter(seconds)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1000,
        callbacks=[stop],
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        **settings,
    )
    spent = cpu_seconds(lambda: trainer.fit(module, data))
    scores = trainer.test(module, data, verbose=False)[0]
    return module, {
        "cpu_s": spent,
        "epochs": len(stop.epochs),
        "epoch_cpu_s": statistics.median(stop.epochs),
        "epochs_cpu_s": [round(seconds, 2) for seconds in stop.epochs],
        "ndcg@10": scores["test/full_ndcg@10"],
        "hit@1_of_20": scores["test/hit@1"],
    }


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder that holds beauty/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="training steps of each variant a round")
    parser.add_argument("--train-cpu-s", type=float, default=100.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    data = DomainDataModule("beauty", TableReader("beauty"), root=arguments.data_root, batch_size=128)
    data.prepare_data()
    data.setup()
    from_random = partial(SequentialRecommender, SASRec())
    from_neighbours = partial(SequentialRecommender, SASRec(dropout=0.4), item_init="cooccurrence")
    _, random_start = train_for(data, arguments.train_cpu_s, from_random())
    module, trained = train_for(data, arguments.train_cpu_s, from_neighbours())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    users = evaluate(data, module)
    epochs = epoch_times(data, arguments.rounds, arguments.steps)
    floors = floor(data.num_items, 128_000)
    loading = statistics.median(cpu_seconds(lambda: list(data.train_dataloader())) for _ in range(3))
    result = {
        "environment": environment(),
        "data": {"users": len(data.splits.eval_users), "items": data.num_items, "targets": epochs.pop("targets")},
        "epoch_cpu_s": epochs,
        "floor_cpu_s": floors,
        "loading_cpu_s": loading,
        "ratio_to_plain": ratio_to_plain(epochs),
        "eval_users_per_cpu_s": users,
        "trained": trained,
        "trained_from_random_items": random_start,
        "peak_rss_gb": peak,
        "targets": TARGETS,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")

    limits = {"chunked, auto": "<= 6", "GRU4Rec, chunked, auto": "<= 7"}
    rows = [
        *((f"epoch, {name} (CPU s)", value, limits.get(name, "")) for name, value in epochs.items()),
        *((f"floor, {name} (CPU s)", value, "") for name, value in floors.items()),
        ("chunked / the faster plain", ratio_to_plain(epochs), ""),
        ("evaluation (users / CPU s)", users, ">= 8000"),
        *(
            (f"test NDCG@10 after {run['cpu_s']:.0f} CPU s, {run['epochs']} epochs{note}", run["ndcg@10"], limit)
            for run, note, limit in ((trained, "", ">= .050"), (random_start, ", random start", ""))
        ),
        ("epoch under the Trainer, median (CPU s)", trained["epoch_cpu_s"], "<= 6"),
        ("loading an epoch's batches (CPU s)", loading, "< 5 % of it"),
        ("peak resident memory (GB)", peak, "< 1"),
    ]
    for name, value, target in rows:
        print(f"{name:48s} {value:10.4g}   {target}")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
