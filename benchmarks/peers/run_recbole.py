"""Train RecBole 1.2.1's SASRec or GRU4Rec for a CPU budget, by RecBole's own data set, loader, model and training loop.

    python benchmarks/peers/run_recbole.py --export EXPORT --out RUNS --model sasrec --budget 60,120,240,480

No file of RecBole is changed. Three places that fail with current libraries are gone around: ``recbole.quick_start`` is
not imported (it imports ray, which uses ``np.bool8``); no checkpoint is loaded (``torch.load`` of a pickled config);
the command line is emptied before ``Config`` reads it as settings of its own. One thing is in its favour: its file of
another model switches autograd's search for NaN on for the whole process; here it is switched off again.
"""

from harness import Export, Score, parse, recorder_of  # isort: skip  sets the threads, so it stands first

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

MODELS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec"}


class BudgetSpent(Exception):
    """Ends the training loop."""


def write_atomic_files(export: Export, folder: Path) -> None:
    """RecBole's format: training interactions with their position as time, and the list of all items."""
    folder.mkdir(parents=True)
    train = export.train
    users = np.repeat(np.arange(len(train)), train.lengths)
    positions = np.arange(len(train.items)) - np.repeat(train.offsets[:-1], train.lengths)
    rows = [f"u{u}\t{i}\t{p}" for u, i, p in zip(users, train.items, positions, strict=True)]
    (folder / "export.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")
    items = [str(item) for item in range(1, export.num_items + 1)]
    (folder / "export.item").write_text("\n".join(["item_id:token", *items]) + "\n")


def settings(arguments: Any, folder: Path) -> dict[str, Any]:
    """RecBole's defaults, but for width, tuned values and where things lie."""
    chosen: dict[str, Any] = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
        "MAX_ITEM_LIST_LENGTH": arguments.max_length,
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "train_batch_size": arguments.batch_size,
        "learning_rate": arguments.lr,
        "seed": arguments.seed,
        "gpu_id": "",
        "use_gpu": False,
        "show_progress": False,
        "hidden_size": arguments.hidden,
    }
    if arguments.model == "sasrec":
        chosen |= {"hidden_dropout_prob": arguments.dropout, "attn_dropout_prob": arguments.dropout}
    else:
        chosen |= {"embedding_size": arguments.hidden, "dropout_prob": arguments.dropout}
    return chosen


def make_score(model: Any, to_recbole: torch.Tensor) -> Score:
    """Scores of the whole catalogue, by our item ids; RecBole pads on the right."""

    def score(histories: torch.Tensor) -> torch.Tensor:
        lengths = (histories != 0).sum(1)
        length = histories.shape[1]
        place = (torch.arange(length) + length - lengths[:, None]) % length
        sequence = to_recbole[histories.gather(1, place)]
        scores = model.full_sort_predict(Interaction({model.ITEM_SEQ: sequence, model.ITEM_SEQ_LEN: lengths}))
        return scores[:, to_recbole]

    return score


def main() -> None:
    """Command line; see the head of this file."""
    arguments = parse("recbole", tuple(MODELS), __doc__, lr=1e-3, dropout=0.5, batch_size=2048)
    arguments.out = str(Path(arguments.out).resolve())
    recorder = recorder_of(arguments, "recbole")
    del sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # RecBole writes logs into the working folder
        folder = Path(scratch)
        write_atomic_files(recorder.export, folder / "export")
        config = Config(model=MODELS[arguments.model], dataset="export", config_dict=settings(arguments, folder))
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        # What ``dataset.build`` does before it splits; the export holds nothing but training data, all of it is used.
        dataset._change_feat_format()
        tokens = dataset.field2token_id[dataset.iid_field]
        to_recbole = torch.tensor([0, *(int(tokens[str(item)]) for item in range(1, recorder.export.num_items + 1))])
        loader = TrainDataLoader(config, dataset, None, shuffle=True)
        model = get_model(config["model"])(config, dataset)
        # Switched on by recbole/model/sequential_recommender/sine.py, which is imported with all models.
        torch.autograd.set_detect_anomaly(False)
        trainer = Trainer(config, model)
        score = make_score(model, to_recbole)
        under_way = False
        epoch = 0

        def loss_within_budget(interaction: Any) -> Any:
            # Called once a step, before it: the former step is complete.
            nonlocal under_way
            if under_way and recorder.step(model, score, epoch):
                raise BudgetSpent
            under_way = True
            return model.calculate_loss(interaction)

        recorder.start(len(loader))
        try:
            while True:
                trainer._train_epoch(loader, epoch, loss_func=loss_within_budget)
                epoch += 1
        except BudgetSpent:
            pass
        os.chdir(recorder.folder)  # the scratch folder is removed


if __name__ == "__main__":
    main()
