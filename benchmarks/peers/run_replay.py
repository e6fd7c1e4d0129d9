"""Train RePlay 0.22's SasRec for a CPU budget, by RePlay's model, transforms and LightningModule. RePlay has no GRU4Rec.

    python benchmarks/peers/run_replay.py --export EXPORT --out RUNS --budget 60,120,240,480

No file of RePlay is changed. Two things are in its favour: batches come from memory instead of Parquet files, and its own
trimming transform cuts the padding of each batch, which its default pipeline leaves in.
"""

from harness import Score, lightning_callback, parse, recorder_of  # isort: skip  sets the threads, so it stands first

from typing import Any

import lightning as L
import numpy as np
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.sequential import SasRec
from replay.nn.transform import TargetAwareAdaptiveTrimTransform
from replay.nn.transform.template import make_default_sasrec_transforms
from torch.utils.data import DataLoader

ITEM = "item_id"


def to_replay(rows: torch.Tensor, num_items: int, transforms: list[torch.nn.Module]) -> dict[str, Any]:
    """Rows (B, L), left-padded with 0, as a batch of RePlay: items from 0, padding N."""
    real = rows != 0
    batch: dict[str, Any] = {ITEM: torch.where(real, rows - 1, num_items), f"{ITEM}_mask": real}
    for transform in transforms:
        batch = transform(batch)
    return batch


def main() -> None:
    """Command line; see the head of this file."""
    arguments = parse("replay", ("sasrec",), __doc__, lr=1e-3, dropout=0.3, batch_size=128)
    recorder = recorder_of(arguments, "replay-rec")
    export = recorder.export
    num_items = export.num_items
    schema = TensorSchema(
        [
            TensorFeatureInfo(
                ITEM,
                is_seq=True,
                feature_type=FeatureType.CATEGORICAL,
                embedding_dim=arguments.hidden,
                padding_value=num_items,
                cardinality=num_items,
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, ITEM)],
            )
        ]
    )
    transforms = make_default_sasrec_transforms(schema)
    # After the shift and the renaming, before the label tensors get their last axis.
    transforms["train"].insert(2, TargetAwareAdaptiveTrimTransform([ITEM, "positive_labels"]))

    def collate(rows: list[int]) -> dict[str, Any]:
        sequences = export.train.padded(np.array(rows), arguments.max_length + 1)
        return to_replay(sequences, num_items, transforms["train"])

    def make_score(module: Any) -> Score:
        def score(histories: torch.Tensor) -> torch.Tensor:
            logits = module(to_replay(histories, num_items, transforms["predict"]))["logits"]
            return torch.nn.functional.pad(logits, (1, 0))

        return score

    users = [int(row) for row in np.flatnonzero(export.train.lengths >= 2)]
    loader = DataLoader(users, batch_size=arguments.batch_size, shuffle=True, collate_fn=collate)
    model = SasRec.from_params(
        schema,
        embedding_dim=arguments.hidden,
        num_heads=2,
        num_blocks=2,
        max_sequence_length=arguments.max_length,
        dropout=arguments.dropout,
    )
    module = LightningModule(model, optimizer_factory=OptimizerFactory(learning_rate=arguments.lr))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=100_000,
        callbacks=[lightning_callback(L.Callback, recorder, make_score)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)


if __name__ == "__main__":
    main()
