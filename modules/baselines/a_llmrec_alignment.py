"""A-LLMRec, stage 1: paired autoencoders that give collaborative and text embeddings of an item one latent space."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch, TrainBatch
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.losses.cross_entropy import cosine_inputs
from lightning_sfubm.modules.losses.ranks import mean_over_ranks
from lightning_sfubm.modules.losses.sampled import binary_cross_entropy, other_items
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.modules.stage1 import CatalogueModule
from lightning_sfubm.seeds import own_step_of, seeded, torch_generator


class Autoencoder(nn.Module):
    """One linear layer with a sigmoid into the latent space, one linear layer back.

    Args:
        input_dim: width of the embeddings.
        latent_dim: width of the latent space.
    """

    def __init__(self, input_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(input_dim, latent_dim)
        self.decoder = nn.Linear(latent_dim, input_dim)

    def encode(self, embeddings: Tensor) -> Tensor:
        """(..., input_dim) -> (..., latent_dim), each entry in (0, 1)."""
        return torch.sigmoid(self.encoder(embeddings))

    def decode(self, latents: Tensor) -> Tensor:
        """(..., latent_dim) -> (..., input_dim)."""
        return self.decoder(latents)


class ALLMRecAlignment(CatalogueModule):
    """Aligns the item embeddings of a frozen, trained recommender with text vectors (arXiv 2404.11343).

    With E an item's collaborative embedding, Q its text vector, f_I and f_T the two autoencoders, at every position of
    the training sequences, for the item that followed and for one drawn item:

    ``L = MSE(f_I.enc(E), f_T.enc(Q)) + alpha MSE(E, f_I(E)) + beta MSE(Q, f_T(Q)) + L_rec``

    L_rec is the binary cross-entropy of the recommender's own score between its user state and the reconstructed item
    f_I(E). The reconstructions keep the latents from collapsing to one point, the last term keeps in them what
    recommends. Only the autoencoders are trained.

    Implements ``CatalogueRanker`` (scores of reconstructed items, for early stopping) and ``Stage1`` for
    :class:`~lightning_sfubm.modules.baselines.a_llmrec.ALLMRec`. The recommender is attached, never stored.

    Args:
        latent_dim: width of the joint latent space; published value 128.
        alpha: weight of the item reconstruction; .5 in the published code.
        beta: weight of the text reconstruction; .2 in the published code.
        lr: peak learning rate of AdamW; published value 1e-4.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps of linear warm-up.
        seed: root of the named streams (initial values, negatives).

    Raises:
        ConfigError: if a setting is out of range.

    Example:
        >>> alignment = ALLMRecAlignment()
        >>> alignment.attach_recommender(recommender, domain.catalogue)   # a trained SequentialRecommender(SASRec(...))
        >>> L.Trainer(max_epochs=10).fit(alignment, datamodule=domain)
    """

    text: Tensor
    affinity_names = ("score",)

    def __init__(
        self,
        latent_dim: int = 128,
        alpha: float = 0.5,
        beta: float = 0.2,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, lr, weight_decay, warmup_steps)
        if latent_dim < 1 or alpha < 0 or beta < 0:
            raise ConfigError(
                f"latent_dim={latent_dim} must be at least 1, alpha={alpha} and beta={beta} must not be negative."
            )
        self.save_hyperparameters()
        self.latent_dim = latent_dim
        self.alpha = alpha
        self.beta = beta
        self.seed = seed
        self.item_dim = 0
        # a list keeps the recommender out of our parameters, checkpoints and modes
        self._recommender: list[SequentialRecommender] = []

    # ------------------------------------------------------------------------------------------------ assembly

    def attach_recommender(self, recommender: SequentialRecommender, catalogue: Catalogue) -> None:
        """Give the module its domain: the trained recommender, frozen from here on, and the catalogue it belongs to.

        Raises:
            ConfigError: if the recommender has no item tables yet, or others than the catalogue.
            CheckpointError: if this module was loaded from a checkpoint that belongs to a recommender of another width.
        """
        if recommender.num_items != catalogue.num_items:
            raise ConfigError(
                f"the recommender has {recommender.num_items} items and domain {catalogue.name!r} "
                f"{catalogue.num_items}; train it on this domain first."
            )
        if self.item_dim not in (0, recommender.hidden_dim):
            raise CheckpointError(
                f"this alignment was trained on a recommender of width {self.item_dim}, got {recommender.hidden_dim}"
            )
        self.item_dim = recommender.hidden_dim
        self._recommender = [recommender.eval()]
        self.bind(catalogue)

    @property
    def recommender(self) -> SequentialRecommender:
        """The attached recommender, on this module's device.

        Raises:
            ConfigError: before one has been attached.
        """
        if not self._recommender:
            raise ConfigError(
                "A-LLMRec's alignment has no recommender; call attach_recommender(recommender, catalogue)"
            )
        return self._recommender[0].to(self.device).eval()

    def build(self, num_items: int, text_dim: int) -> None:
        """Create the autoencoders.

        Raises:
            ConfigError: if there is no recommender or no text.
        """
        if not self.item_dim:
            _ = self.recommender
        if not text_dim:
            raise ConfigError("A-LLMRec aligns items with text vectors, but the datamodule has no text encoder.")
        # Stage 2 has projectors of one input width: user states and latents are padded with zeros to the larger one.
        self.hidden_dim = max(self.item_dim, self.latent_dim)
        with seeded(self.seed, "a_llmrec", "autoencoders"):
            self.item_autoencoder = Autoencoder(self.item_dim, self.latent_dim)
            self.text_autoencoder = Autoencoder(text_dim, self.latent_dim)
        self.register_buffer("text", torch.zeros(num_items + 1, text_dim), persistent=False)

    def load_catalogue(self, catalogue: Catalogue) -> None:
        """Take the text vectors, scaled so that an entry has unit variance: the MSE of unit vectors would be nothing."""
        assert catalogue.text_embeddings is not None
        self.text.copy_(catalogue.text_embeddings * catalogue.text_embeddings.shape[1] ** 0.5)

    def checkpoint_shapes(self) -> dict[str, Any]:
        """As ever, and the recommender's width."""
        return {**super().checkpoint_shapes(), "item_dim": self.item_dim}

    def restore_shapes(self, shapes: Mapping[str, Any]) -> None:
        """Build the autoencoders that a checkpoint belongs to."""
        self.item_dim = self.item_dim or int(shapes["item_dim"])
        super().restore_shapes(shapes)

    # ------------------------------------------------------------------------------------------------ training

    def _scaled(self, states: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """What the recommender's own scores are dot products of."""
        model = self.recommender
        return cosine_inputs(states, items, model.tau) if model.logits == "cosine" else (states, items)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The four losses over all positions that have a next item."""
        model = self.recommender
        table = model.items.frozen()
        history, targets = batch["history"], batch["targets"]
        predicting = targets != 0
        with torch.no_grad():
            states = model.encode(history, table)[predicting]
        taken = targets[predicting]
        generator = torch_generator(self.seed, "a_llmrec", "negatives", *own_step_of(self))
        items = torch.cat([taken, other_items(taken, self.num_items, generator)])
        collaborative, text = table[items], self.text[items]
        item_latents, text_latents = self.item_autoencoder.encode(collaborative), self.text_autoencoder.encode(text)
        reconstructed = self.item_autoencoder.decode(item_latents)
        # As published, the means over taken and over drawn items are summed: twice the mean over both.
        matching = 2 * F.mse_loss(item_latents, text_latents)
        item_loss = 2 * F.mse_loss(reconstructed, collaborative)
        text_loss = 2 * F.mse_loss(self.text_autoencoder.decode(text_latents), text)
        states, reconstructed = self._scaled(states, reconstructed)
        states = states / states.shape[-1]  # as published: a mean of products, beside which alpha and beta were chosen
        places = torch.arange(len(taken), device=items.device)
        recommendation = binary_cross_entropy(states, reconstructed, places, places + len(taken))
        loss = matching + self.alpha * item_loss + self.beta * text_loss + recommendation
        self.log_losses(
            batch,
            loss=loss,
            matching=matching,
            item_reconstruction=item_loss,
            text_reconstruction=text_loss,
            recommendation=recommendation,
        )
        return mean_over_ranks(loss, len(taken))

    # ------------------------------------------------------------------------------------------------ contracts

    def logit_inputs(self, history: Tensor, branch: str = "") -> tuple[Tensor, Tensor]:
        """The recommender's states (B, item_dim) and the reconstructed items (N + 1, item_dim)."""
        table = self.recommender.items.frozen()
        states = self.recommender.encode(history, table)[:, -1]
        return self._scaled(states, self.item_autoencoder.decode(self.item_autoencoder.encode(table)))

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, hidden_dim) the recommender's state after the newest item, padded with zeros."""
        return self._padded(self.recommender.user_states(batch))

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """Joint latents (N + 1, hidden_dim) from the recommender's embeddings and, second, from text; row 0 zero.

        Both are standardised with the mean and deviation of each entry over the first table [choice]: entries of a
        sigmoid differ little from item to item, and the first layer of a projector would have to learn this map.
        """
        items = self.item_autoencoder.encode(self.recommender.items.frozen()[1:])
        texts = self.text_autoencoder.encode(self.text[1:])
        mean, deviation = items.mean(0), items.std(0, correction=0).clamp_min(1e-3)
        ids, semantics = (self._padded(F.pad((table - mean) / deviation, (0, 0, 1, 0))) for table in (items, texts))
        return ids, semantics

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, 1) the scores of :meth:`rank`."""
        return self.rank(batch).unsqueeze(-1)

    def _padded(self, vectors: Tensor) -> Tensor:
        return F.pad(vectors, (0, self.hidden_dim - vectors.shape[-1]))
