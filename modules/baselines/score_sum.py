"""Several trained models, or branches of one, side by side: their scores, weighed on samples that none has seen."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_sfubm.contracts import CatalogueRanker, RankBatch
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.modules.layers.conditional_logit import fit_conditional_logit
from lightning_sfubm.modules.layers.modes import evaluating
from lightning_sfubm.modules.stage1 import CatalogueModule


class Branch(nn.Module):
    """One branch of a stage-1 module as a ranker of its own, such as the teacher beside its student.

    Args:
        module: trained; not copied, not changed.
        name: one of its ``side_branches``.
    """

    def __init__(self, module: CatalogueModule, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C)."""
        return self.module.candidate_scores(batch, self.name)

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1); column 0 (padding) is meaningless."""
        states, items = self.module.logit_inputs(batch["history"], self.name)
        return states @ items.T


class ScoreSum(nn.Module):
    """``sum_m w_m s_m`` over models that were trained by cross-entropy, so that their scores are of one scale [choice].

    Weights start alike, ``1 / M``, and are chosen by conditional logit with a normal prior around that: few samples move
    them little. What is summed are scores as they are, not standardised within the candidates, so that the same weights
    rank the whole catalogue.

    Args:
        models: trained modules that rank; not copied, not changed.
        deviation: of the prior; weights may differ from ``1 / M`` by about this much before samples insist.

    Raises:
        ConfigError: fewer than two models, or a deviation that is not positive.
    """

    weights: Tensor

    def __init__(self, models: Sequence[nn.Module], deviation: float = 0.5) -> None:
        super().__init__()
        if len(models) < 2 or deviation <= 0:
            raise ConfigError(
                f"a sum of scores needs two models and a positive deviation, got {len(models)}, {deviation}"
            )
        self.models = nn.ModuleList(models)
        self.deviation = deviation
        self.register_buffer("weights", torch.full((len(models),), 1 / len(models)))

    def _rankers(self) -> list[CatalogueRanker]:
        return [cast(CatalogueRanker, model) for model in self.models]

    @torch.no_grad()
    def fit(self, batches: Iterable[RankBatch]) -> Tensor:
        """Choose the weights (M,) by the targets among their candidates.

        Args:
            batches: samples that trained none of the models and are not tested: the held-out stage-2 samples.

        Returns:
            The weights.

        Raises:
            DataError: there are no samples, or they have different numbers of candidates.
        """
        self.to(self.weights.device)  # the models may have been left on different devices
        rows = []
        with evaluating(self):
            for batch in batches:
                here: RankBatch = move_data_to_device(batch, self.weights.device)
                rows.append((torch.stack([m.rank(here) for m in self._rankers()], -1).float(), here["target_index"]))
        if not rows:
            raise DataError(
                "a sum of scores has no samples to choose its weights from: set the data's stage2_positions to 1 or more"
            )
        if len({s.shape[1] for s, _ in rows}) > 1:
            raise DataError("a sum of scores needs the same number of candidates in every sample")
        scores, target = torch.cat([s for s, _ in rows]), torch.cat([t for _, t in rows])
        alike = torch.full_like(self.weights, 1 / len(self.models))
        strength = 1 / (2 * self.deviation**2 * len(target))
        self.weights.copy_(fit_conditional_logit(scores, target, alike, alike, strength))
        return self.weights

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C)."""
        return torch.stack([model.rank(batch) for model in self._rankers()], -1) @ self.weights

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1); column 0 (padding) is meaningless."""
        total = self.weights[0] * self._rankers()[0].score_all(batch)
        for weight, model in zip(self.weights[1:], self._rankers()[1:], strict=True):
            total += weight * model.score_all(batch)
        return total
