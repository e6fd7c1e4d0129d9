import pytest
import torch
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.modules.baselines.score_sum import Branch, ScoreSum
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.seeds import torch_generator

ITEMS, CANDIDATES, TRUE = 60, 20, torch.tensor([0.8, 0.4])


class Table(nn.Module):
    """Scores all items of every user by a table."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def score_all(self, batch: RankBatch) -> Tensor:
        return self.scores[batch["user"]]

    def rank(self, batch: RankBatch) -> Tensor:
        return self.score_all(batch).gather(1, batch["candidates"])


class World:
    """Users who choose among their candidates by a known sum of two models' scores, one of them stronger."""

    def __init__(self, users: int) -> None:
        generator = torch_generator(0, "score sum")
        tables = 1.5 * torch.randn(2, users, ITEMS + 1, generator=generator)
        self.models = [Table(table) for table in tables]
        self.candidates = torch.rand(users, ITEMS, generator=generator).topk(CANDIDATES, dim=1).indices + 1
        self.users = torch.arange(users)
        truth = torch.stack([model.rank(self.batch(0, users)) for model in self.models], -1) @ TRUE
        self.target = torch.multinomial(truth.softmax(1), 1, generator=generator).squeeze(1)

    def batch(self, low: int, high: int) -> RankBatch:
        rows = {"user": self.users[low:high], "candidates": self.candidates[low:high]}
        if hasattr(self, "target"):
            rows["target_index"] = self.target[low:high]
        return rows  # type: ignore[return-value]

    def hits(self, ranker: nn.Module, low: int, high: int) -> float:
        best = ranker.rank(self.batch(low, high)).argmax(1)
        return float((best == self.target[low:high]).float().mean())


def test_weights_are_those_of_the_planted_choice() -> None:
    """T32: the weights are found again, and the sum ranks new users better than either model or both weighed alike."""
    world = World(6000)
    both = ScoreSum(world.models)
    assert both.weights.tolist() == [0.5, 0.5]
    alike = world.hits(both, 3000, 6000)
    weights = both.fit([world.batch(low, low + 500) for low in range(0, 3000, 500)])
    torch.testing.assert_close(weights, TRUE, atol=0.08, rtol=0)
    weighed = world.hits(both, 3000, 6000)
    assert weighed > alike > max(world.hits(model, 3000, 6000) for model in world.models)


def test_few_samples_move_the_weights_little() -> None:
    world = World(5)
    for samples in (1, 5):
        weights = ScoreSum(world.models, deviation=0.05).fit([world.batch(0, samples)])
        assert (weights - 0.5).abs().max() < 0.1
    loose = ScoreSum(world.models, deviation=50.0).fit([world.batch(0, 5)])
    assert (loose - 0.5).abs().max() > 0.5


def test_the_prior_is_that_of_the_docstring() -> None:
    """The gradient of log-likelihood and log-prior, summed over samples, is zero at the weights."""
    world = World(200)
    both = ScoreSum(world.models, deviation=0.3)
    weights = both.fit([world.batch(0, 200)]).clone().requires_grad_()
    scores = torch.stack([model.rank(world.batch(0, 200)) for model in world.models], -1)
    loss = nn.functional.cross_entropy(scores @ weights, world.target, reduction="sum")
    loss = loss + ((weights - 0.5) / 0.3).square().sum() / 2
    (grad,) = torch.autograd.grad(loss, weights)
    assert grad.abs().max() < 0.02 * len(world.target) ** 0.5


def test_candidates_and_catalogue_are_ranked_by_the_same_scores() -> None:
    world = World(50)
    both = ScoreSum(world.models)
    both.fit([world.batch(0, 50)])
    batch = world.batch(0, 50)
    torch.testing.assert_close(both.score_all(batch).gather(1, batch["candidates"]), both.rank(batch))
    assert torch.equal(world.models[0].scores, ScoreSum(world.models).models[0].scores)


def test_a_student_beside_its_teacher_ranks_by_both(catalogue: Catalogue) -> None:
    torch.manual_seed(0)
    module = FKDDistiller(SASRec(8, num_heads=1), num_experts=1, phase="student", logits_precision="fp32")
    module.bind(catalogue)
    module.eval()
    candidates = torch.tensor([[1, 4, 9], [2, 3, 5]])
    batch: RankBatch = {"history": torch.tensor([[0, 3, 1], [5, 2, 7]]), "candidates": candidates}  # type: ignore[typeddict-item]
    both = ScoreSum([module, Branch(module, "teacher")])
    both.weights.copy_(torch.tensor([0.7, 0.4]))
    with torch.no_grad():
        expected = 0.7 * module.candidate_scores(batch) + 0.4 * module.candidate_scores(batch, "teacher")
        torch.testing.assert_close(both.rank(batch), expected)
        torch.testing.assert_close(both.score_all(batch).gather(1, candidates), expected)
    assert not torch.allclose(module.candidate_scores(batch), module.candidate_scores(batch, "teacher"))


def test_samples_come_in_any_batches() -> None:
    world = World(90)
    one = ScoreSum(world.models).fit([world.batch(0, 90)])
    three = ScoreSum(world.models).fit([world.batch(low, low + 30) for low in (0, 30, 60)])
    torch.testing.assert_close(one, three)


def test_weights_are_chosen_and_models_left_in_evaluation_mode() -> None:
    """A sum that is put into training mode and back must not leave the dropout of its models switched on."""
    world = World(100)
    noisy = [nn.Sequential(nn.Dropout(0.9)) for _ in world.models]
    for model, dropout in zip(world.models, noisy, strict=True):
        model.dropout = dropout
        model.rank = lambda batch, m=model: m.dropout(m.score_all(batch).gather(1, batch["candidates"]))  # type: ignore[method-assign]
        model.eval()
    both = ScoreSum(world.models)
    assert both.training
    expected = both.fit([world.batch(0, 100)]).clone()
    assert both.training
    assert not any(model.training for model in world.models)
    both.train()
    torch.testing.assert_close(both.fit([world.batch(0, 100)]), expected)
    assert all(model.training for model in world.models)


def test_what_cannot_be_summed_is_named() -> None:
    world = World(4)
    with pytest.raises(ConfigError, match="needs two models and a positive deviation, got 1"):
        ScoreSum(world.models[:1])
    with pytest.raises(ConfigError, match="positive deviation"):
        ScoreSum(world.models, deviation=0)
    with pytest.raises(DataError, match="no samples to choose its weights from"):
        ScoreSum(world.models).fit([])
    batches = [world.batch(0, 2), world.batch(2, 4)]
    batches[1]["candidates"] = batches[1]["candidates"][:, :-1]
    with pytest.raises(DataError, match="a sum of scores needs the same number of candidates in every sample"):
        ScoreSum(world.models).fit(batches)
