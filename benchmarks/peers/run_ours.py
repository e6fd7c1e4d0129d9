"""Train our SASRec or GRU4Rec for a CPU budget.

python benchmarks/peers/run_ours.py --export EXPORT --out RUNS --model sasrec --budget 60,120,240,480
"""

from harness import Score, lightning_callback, parse, recorder_of  # isort: skip  sets the threads, so it stands first

from typing import Any

import lightning as L
import torch
from export import open_data
from torch import nn

from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.sequential import SequentialRecommender


def make_score(module: SequentialRecommender) -> Score:
    """Scores of the whole catalogue."""

    def score(histories: torch.Tensor) -> torch.Tensor:
        states, items = module.logit_inputs(histories)
        return states @ items.T

    return score


def main() -> None:
    """Command line; see the head of this file."""
    ours: dict[str, Any] = {"loss": "full", "num_negatives": 512, "windows": "last", "item_init": "random"}
    ours |= {"input_scale": 1.0, "initializer_range": 0.0}  # 0 = as SASRec's default
    arguments = parse("ours", ("sasrec", "gru4rec"), __doc__, lr=3e-3, dropout=0.2, batch_size=128, **ours)
    recorder = recorder_of(arguments, "lightning-sfubm")
    data = open_data(
        recorder.export.meta,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        windows=arguments.windows,
    )
    sizes: dict[str, Any] = {"hidden_dim": arguments.hidden, "dropout": arguments.dropout}
    encoder: nn.Module = GRU4Rec(**sizes)
    if arguments.model == "sasrec":
        sizes |= {"num_layers": 2, "num_heads": 2, "max_length": arguments.max_length}
        encoder = SASRec(**sizes, initializer_range=arguments.initializer_range or None)
    module = SequentialRecommender(
        encoder,
        loss=arguments.loss,
        num_negatives=arguments.num_negatives,
        item_init=arguments.item_init,
        input_scale=arguments.input_scale,
        lr=arguments.lr,
        seed=arguments.seed,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=100_000,
        callbacks=[lightning_callback(L.Callback, recorder, make_score)],
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
