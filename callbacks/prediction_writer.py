"""Write what ``predict`` recommends as a table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Recommendations as Parquet: one row per user and rank, with the domain's own user and item keys and the title.

    The command line adds one by itself. It writes ``predictions/<domain>.parquet`` below the run folder and acts only on
    modules whose ``predict_step`` returns ``user``, ``items`` and ``scores``.

    Args:
        folder: where the tables go; ``None`` = ``predictions`` below the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the table of one domain; the file appears when it is complete. Ranks write a file each under DDP."""
        data = getattr(trainer, "datamodule", None)
        batches = [p for p in predictions if isinstance(p, dict) and {"user", "items", "scores"} <= p.keys()]
        if not batches or data is None:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        domain = data.domain
        users, items, scores = (torch.cat([b[name].cpu() for b in batches]) for name in ("user", "items", "scores"))
        filled, ranks = items.nonzero(as_tuple=True)  # item 0 stands where a user has had nearly everything
        chosen = pa.array(items[filled, ranks].numpy())
        rows = {
            "user": pa.array(domain.user_keys).take(pa.array(users[filled].numpy())),
            "rank": pa.array((ranks + 1).numpy()),
            "item": pa.array(domain.item_keys).take(chosen),
            "title": pa.array(domain.titles).take(chosen),
            "score": pa.array(scores[filled, ranks].numpy()),
        }
        folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
        target = folder / f"{domain.name}{suffix}.parquet"
        temporary = target.with_suffix(".tmp")
        pq.write_table(pa.table(rows), temporary)
        os.replace(temporary, target)
        print(f"Recommendations of {domain.name}: {target}")
