"""A tiny LLM, a tiny domain and a stand-in for stage 1."""

import pytest
import torch

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.seeds import torch_generator

NUM_ITEMS = 30


class FixedStage1:
    """A stage 1 made of random tables; the second affinity is constant in every row."""

    hidden_dim = 8
    affinity_names = ("score", "constant")

    def __init__(self):
        generator = torch_generator(0, "stage1")
        self.ids = torch.randn(NUM_ITEMS + 1, 8, generator=generator)
        self.semantics = torch.randn(NUM_ITEMS + 1, 8, generator=generator)

    def user_states(self, batch):
        return self.ids[batch["history"]].mean(1)

    def item_tables(self):
        return self.ids, self.semantics

    def affinities(self, batch):
        score = (self.ids[batch["candidates"]] @ self.user_states(batch).unsqueeze(-1)).squeeze(-1)
        return torch.stack([score, torch.ones_like(score)], dim=-1)


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    return str(write_tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="session")
def catalogue():
    titles = ["", *(f"{i} {'very ' * (i % 3)}long film" for i in range(1, NUM_ITEMS + 1))]
    return Catalogue("tiny", NUM_ITEMS, titles, None, torch.zeros(NUM_ITEMS + 1, dtype=torch.long))


@pytest.fixture(scope="session")
def stage1():
    return FixedStage1()


@pytest.fixture(scope="session")
def make_batch():
    def make(rows=3, candidates=5, length=6, seed=0):
        generator = torch_generator(seed, "batch")
        history = torch.randint(1, NUM_ITEMS + 1, (rows, length), generator=generator)
        for row in range(rows):
            history[row, : row % length] = 0
        chosen = torch.stack([torch.randperm(NUM_ITEMS, generator=generator)[:candidates] + 1 for _ in range(rows)])
        index = torch.randint(0, candidates, (rows,), generator=generator)
        return {
            "history": history,
            "candidates": chosen,
            "target_index": index,
            "target": chosen.gather(1, index.unsqueeze(1)).squeeze(1),
            "user": torch.arange(rows),
        }

    return make
