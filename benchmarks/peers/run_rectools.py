"""Train RecTools 0.19's SASRecModel for a CPU budget, by RecTools' data preparation and training. It has no GRU4Rec.

    python benchmarks/peers/run_rectools.py --export EXPORT --out RUNS --budget 60,120,240,480

No file of RecTools is changed. It knows the items of the training data only; others cannot be ranked and count as last.
"""

from harness import Export, Score, lightning_callback, parse, recorder_of  # isort: skip  sets the threads: stands first

from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def interactions(export: Export) -> pd.DataFrame:
    """Training interactions, one second apart in the order of the sequence."""
    train = export.train
    positions = np.arange(len(train.items)) - np.repeat(train.offsets[:-1], train.lengths)
    return pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(train)), train.lengths),
            Columns.Item: train.items.astype(np.int64),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(positions, unit="s"),
        }
    )


def main() -> None:
    """Command line; see the head of this file."""
    arguments = parse("rectools", ("sasrec",), __doc__, lr=1e-3, dropout=0.2, batch_size=128)
    recorder = recorder_of(arguments, "rectools")
    num_items, length = recorder.export.num_items, arguments.max_length

    def make_score(module: Any) -> Score:
        preparator, model = module.data_preparator, module.torch_model
        known = torch.as_tensor(np.asarray(preparator.get_known_item_ids(), dtype=np.int64))
        first = preparator.n_item_extra_tokens
        to_rectools = torch.zeros(num_items + 1, dtype=torch.int64)
        to_rectools[known] = torch.arange(first, first + len(known))

        def score(histories: torch.Tensor) -> torch.Tensor:
            x = to_rectools[histories]
            x = x.gather(1, (x != 0).int().argsort(dim=1, stable=True))  # unknown items leave no gap
            # Padding is attended to in RecTools, so its length must be that of training.
            x = torch.nn.functional.pad(x, (length - x.shape[1], 0))
            item_vectors = model.item_model.get_all_embeddings()
            states = model.encode_sessions({"x": x}, item_vectors)[:, -1]
            scores = torch.full((len(x), num_items + 1), -torch.inf)
            scores[:, known] = (states @ item_vectors.T)[:, first:]
            return scores

        return score

    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=arguments.hidden,
        dropout_rate=arguments.dropout,
        session_max_len=length,
        loss="softmax",
        lr=arguments.lr,
        batch_size=arguments.batch_size,
    )
    # The documented way to a trainer of one's own once the model is there.
    model._trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=100_000,
        callbacks=[lightning_callback(pl.Callback, recorder, make_score)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    model.fit(Dataset.construct(interactions(recorder.export)))


if __name__ == "__main__":
    main()
