"""Prompt projector alone: soft tokens of items are aligned with the LLM's own words for them."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.contracts import Catalogue, Stage1
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.llm.optim import adamw_with_warmup
from lightning_sfubm.modules.llm.projection import TokenProjector
from lightning_sfubm.modules.llm.stage1 import check_same_catalogue, load_stage1
from lightning_sfubm.modules.llm.titles import mean_title_embeddings
from lightning_sfubm.modules.losses.ranks import mean_over_ranks
from lightning_sfubm.seeds import seeded


class PromptProjector(L.LightningModule):
    """P_u, P_i and P_t, pre-aligned: an item's soft token against the mean token embedding of its title (InfoNCE).

    The soft token of item i should be nearest to the words of title i among the titles of the batch; both are
    centred on their mean over the catalogue or batch first, because token embeddings share a large common part that
    carries no meaning [choice]. P_u shares the user-state space with the ID embeddings (their dot product is stage
    1's logit), so it learns from ID embeddings in the place of user states [choice].

    Args:
        llm: the base model whose token space is aimed at.
        stage1_checkpoint: stage 1, loaded in ``setup`` where nothing was attached.
        title_tokens: tokens of a title that count.
        temperature: tau of InfoNCE.
        learning_rate: of AdamW.
        warmup: share of steps with rising learning rate.
        seed: of initial values.

    Example:
        >>> projector = PromptProjector("smollm2-135m")
        >>> projector.attach_stage1(stage1, catalogue)
        >>> L.Trainer(max_epochs=20).fit(projector, datamodule=ItemDataModule(domain))
    """

    title_table: Tensor
    id_table: Tensor
    semantic_table: Tensor

    def __init__(
        self,
        llm: str = "smollm2-135m",
        stage1_checkpoint: str | None = None,
        title_tokens: int = 12,
        temperature: float = 0.07,
        learning_rate: float = 1e-3,
        warmup: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"temperature must be positive, got {temperature}")
        self.save_hyperparameters()
        self.tokens: TokenProjector | None = None
        self.catalogue: Catalogue | None = None

    @property
    def settings(self) -> Any:
        """The hyper-parameters, as an object with one attribute each."""
        return self.hparams

    def attach_stage1(self, stage1: Stage1, catalogue: Catalogue) -> None:
        """Read the item tables and the titles, and build the projectors."""
        hp = self.settings
        targets, scale = mean_title_embeddings(hp.llm, catalogue.titles, hp.title_tokens)
        with torch.no_grad():
            ids, semantics = stage1.item_tables()
        targets[1:] -= targets[1:].mean(0)
        self.register_buffer("title_table", targets, persistent=False)
        self.register_buffer("id_table", ids.detach().float().cpu(), persistent=False)
        self.register_buffer("semantic_table", semantics.detach().float().cpu(), persistent=False)
        self._build(int(stage1.hidden_dim), targets.shape[1], scale)
        self.catalogue = catalogue

    def _build(self, hidden_dim: int, output_dim: int, scale: float) -> None:
        if self.tokens is None:
            with seeded(self.settings.seed, "projector"):
                self.tokens = TokenProjector(hidden_dim, output_dim, scale)

    def setup(self, stage: str) -> None:
        """Take catalogue and stage 1 from the datamodule and ``stage1_checkpoint`` where nothing was attached.

        Raises:
            ConfigError: one of them is missing, or the attached catalogue is another domain's than the datamodule's.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.catalogue is not None:
            check_same_catalogue(self.catalogue, datamodule)
        else:
            catalogue = getattr(datamodule, "catalogue", None)
            if catalogue is None or not self.settings.stage1_checkpoint:
                raise ConfigError(
                    "the projector needs a datamodule and stage1_checkpoint, or attach_stage1() before fit"
                )
            self.attach_stage1(load_stage1(self.settings.stage1_checkpoint, catalogue), catalogue)

    def training_step(self, items: Tensor, batch_idx: int) -> Tensor:
        """InfoNCE of the item parts plus InfoNCE of the user part, over a batch of item ids (B,).

        Raises:
            ConfigError: the batch is none of item ids.
        """
        if not isinstance(items, Tensor):
            raise ConfigError(
                "PromptProjector is trained on item ids, which these data do not give: use lightning_sfubm.datamodules."
                "item_datamodule.ItemDataModule over the domain"
            )
        assert self.tokens is not None
        ids, titles = self.id_table[items], self.title_table[items]
        soft = self.tokens.items(ids, self.semantic_table[items])
        loss = self._info_nce(soft, titles)
        user_loss = self._info_nce(self.tokens.users(ids), titles)
        self.log("train/item_nce", loss, prog_bar=True, batch_size=len(items))
        self.log("train/user_nce", user_loss, batch_size=len(items))
        return mean_over_ranks(loss + user_loss, len(items))

    def _info_nce(self, soft: Tensor, titles: Tensor) -> Tensor:
        centred = F.normalize(soft - soft.mean(0), dim=-1)
        logits = centred @ F.normalize(titles, dim=-1).T / self.settings.temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and decay."""
        hp = self.settings
        return adamw_with_warmup(self, {"projectors": (lambda name: True, hp.learning_rate, 0.01)}, hp.warmup)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the shapes."""
        assert self.tokens is not None
        shape = {"hidden_dim": self.tokens.input_dim, "output_dim": self.tokens.output_dim, "scale": self.tokens.scale}
        checkpoint["sfubm_projector"] = shape

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the projectors before their weights are loaded."""
        if "sfubm_projector" not in checkpoint:
            raise CheckpointError("this is not a checkpoint of a prompt projector (no entry 'sfubm_projector')")
        self._build(**checkpoint["sfubm_projector"])
