"""A tiny LLM, a few films and batches over them, for the LLM baselines."""

import lightning as L
import pytest
import torch

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import torch_generator

NUM_FILMS = 30


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    return str(write_tiny_llm(tmp_path_factory.mktemp("tiny_llm")))


@pytest.fixture(scope="session")
def films():
    """Films with odd numbers are called film, those with even numbers item."""
    titles = ["", *(f"{i} {'film' if i % 2 else 'item'}" for i in range(1, NUM_FILMS + 1))]
    text = torch.nn.functional.normalize(torch.randn(NUM_FILMS + 1, 12, generator=torch_generator(0, "films")), dim=1)
    text[0] = 0.0
    return Catalogue("films", NUM_FILMS, titles, text, torch.ones(NUM_FILMS + 1, dtype=torch.long))


@pytest.fixture
def recommender(films):
    torch.manual_seed(0)
    module = SequentialRecommender(SASRec(hidden_dim=8, num_layers=1, num_heads=1))
    module.bind(films)
    return module.eval()


@pytest.fixture(scope="session")
def film_batch():
    def make(rows=3, candidates=5, length=6, seed=0, target=None):
        """Random batches; with ``target``, the wanted film is always that one."""
        generator = torch_generator(seed, "film batch")
        history = torch.randint(1, NUM_FILMS + 1, (rows, length), generator=generator)
        for row in range(rows):
            history[row, : row % length] = 0
        chosen = torch.stack([torch.randperm(NUM_FILMS, generator=generator)[:candidates] + 1 for _ in range(rows)])
        index = torch.randint(0, candidates, (rows,), generator=generator)
        if target is not None:
            chosen[chosen == target] = target + 1
            chosen.scatter_(1, index.unsqueeze(1), target)
        return {
            "history": history,
            "candidates": chosen,
            "target_index": index,
            "target": chosen.gather(1, index.unsqueeze(1)).squeeze(1),
            "user": torch.arange(rows),
        }

    return make


@pytest.fixture(scope="session")
def hinted_batch(film_batch):
    """Batches where film 7 or film 12, both among the candidates, is wanted, depending on the newest item of the history."""

    def make(hints, rows=8, seed=0):
        """``hints`` (N + 1,) bool: whether an item announces film 7."""
        batch = film_batch(rows=rows, candidates=7, seed=seed)
        generator = torch_generator(seed, "hinted batch")
        for row, drawn in enumerate(batch["candidates"]):
            others = drawn[(drawn != 7) & (drawn != 12)][:3]
            batch["candidates"][row, :5] = torch.cat([others, torch.tensor([7, 12])])[
                torch.randperm(5, generator=generator)
            ]
        batch["candidates"] = batch["candidates"][:, :5]
        batch["target"] = torch.where(hints[batch["history"][:, -1]], 7, 12)
        batch["target_index"] = (batch["candidates"] == batch["target"].unsqueeze(1)).int().argmax(1)
        return batch

    return make


@pytest.fixture
def tune(tmp_path):
    """Train a module on a list of batches; returns the trainer."""

    def run(module, batches, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            **{
                "accelerator": "cpu",
                "max_epochs": 1,
                "enable_checkpointing": False,
                "default_root_dir": tmp_path,
                "gradient_clip_val": 1.0,
                **quiet,
                **options,
            }
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        return trainer

    return run
