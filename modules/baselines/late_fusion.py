"""Late fusion: a weighted sum of an encoder's scores and untrained text similarities. The control without an LLM."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_sfubm.contracts import RankBatch, Stage1
from lightning_sfubm.errors import DataError
from lightning_sfubm.modules.layers.affinity import num_products, standardise, with_products
from lightning_sfubm.modules.layers.conditional_logit import fit_conditional_logit
from lightning_sfubm.modules.layers.modes import evaluating


class LateFusion(nn.Module):
    """``sum_f w_f z_f``: affinity features standardised within each row, weights by conditional logit [choice].

    Whatever an LLM adds, it must add over this. The weights also initialise the residual of the LLM head, so that tuning
    starts from here.

    Args:
        stage1: trained module whose ``affinities`` are fused; not changed.
        penalty: of the squared weights of features, beside a log-likelihood summed over samples: it matters less the more
            samples there are.
        products: weigh the products of each two features, and the squares, besides: what one says can then depend on what
            another says. F (F + 3) / 2 weights instead of F.
        product_penalty: of the squared weights of products, of which there are many.
    """

    weights: Tensor

    def __init__(
        self, stage1: Stage1, penalty: float = 2.0, products: bool = False, product_penalty: float = 40.0
    ) -> None:
        super().__init__()
        self._stage1 = [stage1]  # in a list: not a sub-module, its parameters are not this method's
        self.products = products
        features = len(stage1.affinity_names)
        first = torch.zeros(num_products(features) if products else features)
        first[0] = 1.0
        self._penalties = torch.full_like(first, penalty)
        self._penalties[features:] = product_penalty
        self.register_buffer("weights", first)

    def _standardised(self, batch: RankBatch) -> Tensor:
        """(B, C, F), with products where asked for, on the weights' device.

        Stage 1 follows to that device: its training or evaluation may have left it on another.
        """
        stage1 = self._stage1[0]
        if isinstance(stage1, nn.Module):
            stage1.to(self.weights.device)
        with evaluating(stage1) if isinstance(stage1, nn.Module) else nullcontext():
            features = standardise(stage1.affinities(move_data_to_device(batch, self.weights.device)))
        return with_products(features) if self.products else features

    @torch.no_grad()
    def _features(self, batches: Iterable[RankBatch]) -> tuple[Tensor, Tensor]:
        rows = [(self._standardised(b), b["target_index"].to(self.weights.device)) for b in batches]
        if not rows:
            raise DataError(
                "late fusion has no samples to choose its weights from: set the data's stage2_positions to 1 or more"
            )
        width = max(a.shape[1] for a, _ in rows)
        if any(a.shape[1] != width for a, _ in rows):
            raise DataError("late fusion needs the same number of candidates in every sample")
        return torch.cat([a for a, _ in rows]), torch.cat([t for _, t in rows])

    def fit(self, batches: Iterable[RankBatch]) -> Tensor:
        """Choose the weights (F,) by maximum likelihood of the target among its candidates, with L-BFGS.

        Args:
            batches: samples that neither trained the stage-1 module nor are tested: held-out stage-2 samples, validation.

        Returns:
            The weights.

        Raises:
            DataError: there are no samples, or they have different numbers of candidates.
        """
        features, target = self._features(batches)
        strength = self._penalties.to(features) / len(target)
        weights = fit_conditional_logit(features, target, self.weights, torch.zeros_like(self.weights), strength)
        self.weights.copy_(weights)
        return self.weights

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C)."""
        return self._standardised(batch) @ self.weights
