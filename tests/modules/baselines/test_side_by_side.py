"""Two first stages as one: columns, and that a fusion of them finds what either alone cannot."""

import torch
from torch import Tensor, nn

from lightning_sfubm.contracts import RankBatch, Stage1
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.baselines.side_by_side import SideBySide
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES
from lightning_sfubm.seeds import torch_generator

USERS, CANDIDATES = 4000, 10


class Student(nn.Module):
    """Says of each candidate what a table has for it."""

    hidden_dim = 4
    affinity_names = ("score", "teacher", *TEXT_AFFINITIES)

    def __init__(self, scores: Tensor, text: Tensor) -> None:
        super().__init__()
        self.scores, self.text = scores, text

    def user_states(self, batch: RankBatch) -> Tensor:
        return self.scores[batch["user"], :4]

    def item_tables(self) -> tuple[Tensor, Tensor]:
        return self.scores[:, :4], self.scores[:, :4]

    def affinities(self, batch: RankBatch) -> Tensor:
        return torch.stack([self.scores, -self.scores, *self.text], -1)[batch["user"]]


def students() -> tuple[Student, Student, Tensor]:
    """Two of the same texts, with scores of their own, and targets that follow both scores alike."""
    generator = torch_generator(0, "side by side")
    first, second, *text = torch.randn(5, USERS, CANDIDATES, generator=generator)
    target = torch.multinomial((first + second).softmax(1), 1, generator=generator).squeeze(1)
    return Student(first, torch.stack(text)), Student(second, torch.stack(text)), target


def test_columns_are_those_of_the_first_and_what_the_other_has_learned() -> None:
    first, second, _ = students()
    both = SideBySide(first, second)
    assert both.affinity_names == ("score", "teacher", *TEXT_AFFINITIES, "other_score", "other_teacher")
    batch: RankBatch = {"user": torch.arange(7)}  # type: ignore[typeddict-item]
    columns = both.affinities(batch)
    assert columns.shape == (7, CANDIDATES, len(both.affinity_names))
    torch.testing.assert_close(columns[..., :5], first.affinities(batch))
    torch.testing.assert_close(columns[..., 5], second.scores[:7])
    torch.testing.assert_close(columns[..., 6], -second.scores[:7])
    assert both.user_states(batch).equal(first.user_states(batch))
    assert both.item_tables()[1].equal(first.item_tables()[1])
    assert both.hidden_dim == first.hidden_dim


def test_a_fusion_of_both_finds_what_neither_alone_can() -> None:
    """T32: targets follow the sum of two scores; weights are fitted on one half of the users, hits counted on the other."""
    first, second, target = students()

    def hits(stage1: Stage1) -> float:
        fusion = LateFusion(stage1)
        half: RankBatch = {"user": torch.arange(USERS // 2), "target_index": target[: USERS // 2]}  # type: ignore[typeddict-item]
        rest: RankBatch = {"user": torch.arange(USERS // 2, USERS)}  # type: ignore[typeddict-item]
        fusion.fit([half])
        return float((fusion.rank(rest).argmax(1) == target[USERS // 2 :]).float().mean())

    alone, together = max(hits(first), hits(second)), hits(SideBySide(first, second))
    best = float(((first.scores + second.scores).argmax(1) == target)[USERS // 2 :].float().mean())
    assert together > alone + 0.1
    assert together > best - 0.02
