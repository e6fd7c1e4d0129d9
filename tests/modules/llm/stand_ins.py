"""A tiny domain, a stand-in for stage 1, and batches of ranking samples."""

import torch

from lightning_sfubm.contracts import Catalogue, RankBatch
from lightning_sfubm.seeds import torch_generator

NUM_ITEMS = 30


class FixedStage1:
    """A stage 1 made of random tables; the second affinity is constant in every row."""

    hidden_dim = 8
    affinity_names = ("score", "constant")

    def __init__(self) -> None:
        generator = torch_generator(0, "stage1")
        self.ids = torch.randn(NUM_ITEMS + 1, 8, generator=generator)
        self.semantics = torch.randn(NUM_ITEMS + 1, 8, generator=generator)

    def user_states(self, batch: RankBatch) -> torch.Tensor:
        return self.ids[batch["history"]].mean(1)

    def item_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids, self.semantics

    def affinities(self, batch: RankBatch) -> torch.Tensor:
        score = (self.ids[batch["candidates"]] @ self.user_states(batch).unsqueeze(-1)).squeeze(-1)
        return torch.stack([score, torch.ones_like(score)], dim=-1)


def tiny_catalogue() -> Catalogue:
    titles = ["", *(f"{i} {'very ' * (i % 3)}long film" for i in range(1, NUM_ITEMS + 1))]
    return Catalogue("tiny", NUM_ITEMS, titles, None, torch.zeros(NUM_ITEMS + 1, dtype=torch.long))


def batch_of(rows: int = 3, candidates: int = 5, length: int = 6, seed: int = 0) -> RankBatch:
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
