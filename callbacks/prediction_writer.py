"""Write what ``predict`` recommends as a table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        rows: dict[str, list[Any]] = {name: [] for name in ("user", "rank", "item", "title", "score")}
        for batch in batches:
            for user, items, scores in zip(
                batch["user"].tolist(), batch["items"].tolist(), batch["scores"].tolist(), strict=True
            ):
                for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1):
                    if item:
                        key, title = domain.item_keys[item], domain.titles[item]
                        for name, value in zip(rows, (domain.user_keys[user], rank, key, title, score), strict=True):
                            rows[name].append(value)
        folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
        target = folder / f"{domain.name}{suffix}.parquet"
        temporary = target.with_suffix(".tmp")
        pq.write_table(pa.table(rows), temporary)
        os.replace(temporary, target)
        print(f"Recommendations of {domain.name}: {target}")
