"""Quality on MovieLens-100K after 100 CPU seconds: `python benchmarks/quality.py [--cpu-s 100]`.

SASRec (d 64, 2 layers, dropout .2, full cross-entropy, learning rate .003, all windows of 50) on one thread; validation after
each epoch is part of the budget, the epoch with the best validation NDCG@10 is tested. Leave one out by time, whole catalogue,
history masked. Writes benchmarks/results/quality.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stage1 import StopAfter

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.readers.movielens import MovieLensReader
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.safe_load import load_checkpoint

RESULTS = Path(__file__).parent / "results" / "quality.json"
LIMIT = 0.096


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-s", type=float, default=100.0)
    budget = parser.parse_args().cpu_s
    torch.set_num_threads(1)
    reader = MovieLensReader(variant="recbole-100k")
    data = DomainDataModule("movielens-100k", reader, k_core=5, windows="all", batch_size=32)
    data.prepare_data()
    data.setup()
    L.seed_everything(1, verbose=False)
    module = SequentialRecommender(SASRec(hidden_dim=64, dropout=0.2), lr=3e-3)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(dirpath=folder, monitor="val/full_ndcg@10", mode="max", save_weights_only=True)
        stop = StopAfter(budget - 3)  # the epoch in which it is spent is trained to its end
        settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1000,
            callbacks=[stop, best],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **settings,
        )
        start = time.process_time()
        trainer.fit(module, data)
        spent = time.process_time() - start
        module.load_state_dict(load_checkpoint(best.best_model_path)["state_dict"])
        scores = trainer.test(module, data, verbose=False)[0]
    assert best.best_model_score is not None
    result = {
        "data": {"users": len(data.splits.eval_users), "items": data.num_items},
        "cpu_s": round(spent, 1),
        "epochs": len(stop.epochs),
        "validation_ndcg@10": float(best.best_model_score),
        "ndcg@10": scores["test/full_ndcg@10"],
        "limit": LIMIT,
        "environment": environment(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"test NDCG@10 {result['ndcg@10']:.4f} after {spent:.0f} CPU-s, {len(stop.epochs)} epochs (limit {LIMIT})")


if __name__ == "__main__":
    main()
