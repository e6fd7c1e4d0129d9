"""Pre-training of UniSRec over the union of all domains: an upper bound, because it breaks the privacy of each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import TrainBatch
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.unisrec import transferable
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.losses.cross_entropy import cosine_inputs
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.losses.ranks import mean_over_ranks
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import step_of, torch_generator


class UniSRecPretraining(SequentialRecommender):
    """Contrastive pre-training of adaptor and encoder (Hou et al., arXiv 2206.05941).

    Train it on a :class:`~lightning_sfubm.datamodules.union_datamodule.UnionDataModule`, whose batches hold the users of all
    domains: the negatives of a sequence come from every domain. **No silo could do this**, since all behaviour lies in one
    place; it stands in a table as what a federation may hope for.

    - Sequence-item: each position against the next items of all positions of the batch.
    - Sequence-sequence: each row's last state against those of an augmented copy, in which items are left out or, where the
      datamodule has ``masked_text``, item texts have lost words.
    - Loss = sequence-item + ``seq_seq_weight`` sequence-sequence.

    Args:
        encoder: a module that keeps :class:`lightning_sfubm.contracts.Encoder`; ``None`` = ``SASRec()``.
        seq_seq_weight: lambda; 0 leaves the second encoding out.
        drop_ratio: chance that an item is left out, or loses words, in the augmented copy.
        item_drop_share: share of the batches that leave items out, the rest drops words.
        num_experts: whitening experts G of the adaptor.
        text_dropout: dropout of text vectors while training.
        tau: temperature of all cosines.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up.
        logits_precision: number format of the adaptor's product and of the evaluation.
        seed: root of the named streams.

    Raises:
        ConfigError: if a setting is out of range.
    """

    masked_text: Tensor | None

    def __init__(
        self,
        encoder: nn.Module | None = None,
        seq_seq_weight: float = 1e-3,
        drop_ratio: float = 0.2,
        item_drop_share: float = 0.9,
        num_experts: int = 8,
        text_dropout: float = 0.2,
        tau: float = 0.07,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        logits_precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        if seq_seq_weight < 0 or not 0 <= drop_ratio < 1 or not 0 <= item_drop_share <= 1:
            raise ConfigError(
                f"seq_seq_weight={seq_seq_weight} must not be negative, drop_ratio={drop_ratio} must lie in [0, 1) and "
                f"item_drop_share={item_drop_share} in [0, 1]."
            )
        # One that is to stay fixed while tuning, as UniSRec's, is trained here.
        encoder = SASRec() if encoder is None else encoder.requires_grad_(True).train()
        super().__init__(
            encoder,
            features="text",
            logits="cosine",
            tau=tau,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            num_experts=num_experts,
            text_dropout=text_dropout,
            logits_precision=logits_precision,
            seed=seed,
        )
        self.seq_seq_weight = seq_seq_weight
        self.drop_ratio = drop_ratio
        self.item_drop_share = item_drop_share
        # Not saved: it is needed while training only, and the datamodule has it.
        self.register_buffer("masked_text", None, persistent=False)

    def setup(self, stage: str) -> None:
        """Bind to the union's catalogue and take the vectors of texts with dropped words."""
        super().setup(stage)
        self.masked_text = getattr(getattr(self.trainer, "datamodule", None), "masked_text", None)

    def shared_state(self) -> dict[str, Tensor]:
        """Detached copies of adaptor and encoder, for :meth:`UniSRec.load_pretrained`."""
        return {name: parameter.detach().clone() for name, parameter in transferable(self).items()}

    # ------------------------------------------------------------------ training

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Both contrasts over the batch, logged as ``train/seq_item`` and ``train/seq_seq``."""
        history, targets = batch["history"], batch["targets"]
        # Only the batch's items pass the adaptor: the union's catalogue is large.
        ids, places = torch.unique(torch.stack([history, targets]), return_inverse=True)
        table = self._adapt(ids, self.items.text)
        states = self._states(F.embedding(places[0], table), history)
        predicting = targets != 0
        seq_item = sequence_item_loss(states[predicting], table, places[1][predicting], self.tau)
        terms = {"seq_item": seq_item}
        loss, weighed = seq_item, mean_over_ranks(seq_item, int(predicting.sum()))
        if self.seq_seq_weight:
            augmented = self._augmented_states(history, places[0], ids, table)
            terms["seq_seq"] = sequence_sequence_loss(states[:, -1], augmented[:, -1], targets[:, -1], self.tau)
            loss = loss + self.seq_seq_weight * terms["seq_seq"]
            weighed = weighed + self.seq_seq_weight * mean_over_ranks(terms["seq_seq"], len(history))
        self.log_losses(batch, loss=loss, **terms)
        return weighed

    def _adapt(self, ids: Tensor, text: Tensor) -> Tensor:
        """Vectors (M, H) of items (M,), zero for padding."""
        assert self.items.adaptor is not None
        return self.items.adaptor(F.embedding(ids, text)) * (ids != 0).unsqueeze(1)

    def _states(self, vectors: Tensor, history: Tensor) -> Tensor:
        return self.encoder(vectors, history != 0)

    def _augmented_states(self, history: Tensor, places: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """States (B, L, H) of the batch's augmented copy.

        Args:
            history: (B, L) item ids.
            places: (B, L) rows of ``ids`` they stand at.
            ids: (M,) distinct item ids.
            table: (M, H) their vectors.
        """
        generator = torch_generator(self.seed, "augmentation", *step_of(self))
        items = float(torch.rand((), generator=generator)) < self.item_drop_share
        chosen = (torch.rand(history.shape, generator=generator) < self.drop_ratio).to(history.device)
        if items or self.masked_text is None:
            order, kept = without_items(history, chosen)
            return self._states(F.embedding(places.gather(1, order), table), kept)
        masked = self._adapt(ids, self.masked_text)
        vectors = torch.where(chosen.unsqueeze(-1), F.embedding(places, masked), F.embedding(places, table))
        return self._states(vectors, history)


def without_items(history: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Leave items out and close the gaps; the oldest item of a row always stays.

    Args:
        history: (B, L) item ids, left-padded.
        dropped: (B, L) boolean, True where an item goes.

    Returns:
        (B, L) positions that the new ones take their item from, and the left-padded ids (B, L).
    """
    real = history != 0
    oldest = real & (real.cumsum(1) == 1)
    keep = real & (~dropped | oldest)
    order = keep.long().argsort(dim=1, stable=True)
    return order, history.masked_fill(~keep, 0).gather(1, order)


def sequence_item_loss(states: Tensor, table: Tensor, targets: Tensor, tau: float) -> Tensor:
    """InfoNCE of each state's next item among the next items of all states.

    Every other state with another next item is a negative, counted as often as it occurs; states with the same next item
    are not. Items are scored once: an item that follows c states enters the denominator with log c added to its logit.

    Args:
        states: (V, H).
        table: (M, H) vectors of distinct items.
        targets: (V,) rows of ``table``; rows that no state aims at are no negatives.
        tau: temperature of the cosines.

    Returns:
        Scalar mean loss; 0 if V is 0.
    """
    if len(states) == 0:
        return states.sum() + 0.0 * table.sum()
    aimed, columns, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    queries, items = cosine_inputs(states, table[aimed], tau)
    weights = counts.to(queries.dtype).log()
    logits = torch.addmm(weights, queries, items.T).float()  # under autocast the product is of a lower precision
    # The positive counts once, however many states share it.
    logits.index_put_(
        (torch.arange(len(states), device=states.device), columns), -weights[columns].float(), accumulate=True
    )
    return F.cross_entropy(logits, columns)


def sequence_sequence_loss(states: Tensor, augmented: Tensor, targets: Tensor, tau: float) -> Tensor:
    """InfoNCE of each sequence's augmented copy among those of the batch.

    Args:
        states: (B, H) states of the sequences.
        augmented: (B, H) states of their augmented copies.
        targets: (B,) next items; other sequences with the same next item are no negatives.
        tau: temperature of the cosines.

    Returns:
        Scalar mean loss.
    """
    queries, copies = cosine_inputs(states, augmented, tau)
    rows = torch.arange(len(states), device=states.device)
    same = (targets[:, None] == targets) & (rows[:, None] != rows)
    return F.cross_entropy((queries @ copies.T).masked_fill(same, -torch.inf), rows)
