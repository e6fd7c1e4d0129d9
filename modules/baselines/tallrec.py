"""TALLRec: instructions in words alone, answered by a LoRA-tuned LLM; as the candidate choice and as its own binary task."""

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from lightning_sfubm.contracts import RankBatch
from lightning_sfubm.datamodules.preference_datamodule import PreferenceBatch
from lightning_sfubm.datamodules.prompt_templates import load_template
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.published_head import PublishedHead
from lightning_sfubm.modules.losses.ranks import mean_over_ranks

#: the published adapters sit on the query and value projections
QUERY_VALUE = r".*\.(q|v)_proj"

#: entries of a model's configuration that scale or cap its logits
RESCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping")


class _Instructed(PublishedHead):
    """Text-only instructions in the tokenizer's chat format; as plain text where the tokenizer has none [choice]."""

    reads_stage1 = False

    def _build_prompts(self) -> None:
        chat = bool(getattr(self.lm.tokenizer, "chat_template", None))
        self.template = replace(self.template, chat=chat)
        super()._build_prompts()


class TALLRec(_Instructed):
    """TALLRec recast to the choice among candidates: titles only, LoRA, loss on the answer's tokens (arXiv 2305.00447).

    The candidates stand in the instruction and the answer is a title.

    Args:
        llm: as for :class:`~lightning_sfubm.modules.llm_head.LLMHead`, like all that is not described here.
        num_layers: ``None`` keeps all; the vocabulary head reads the last one.
        template: see there; ``None`` = ``shopping``, or in a table that of its LLM. Its entry ``chat`` gives way to the rule of
            this method.
        rank_mode: ``generate``, ``constrained`` or ``score``.
        adapter_rank: published value 8.
        adapter_alpha: published value 16.
        adapter_dropout: published value .05.
        adapter_targets: published: query and value projections.
        history_length: published value 10.
        title_tokens: see there.
        adapter_learning_rate: see there.
        weight_decay: see there.
        warmup: see there.
        precision: see there.
        activation_checkpointing: see there.
        seed: see there.

    Example:
        >>> head = TALLRec.from_head(llm_head.hparams, rank_mode="constrained")
        >>> head.attach_stage1(None, catalogue)
    """

    def __init__(
        self,
        llm: str = "smollm2-135m",
        num_layers: int | None = None,
        template: str | None = None,
        rank_mode: str = "generate",
        adapter_rank: int = 8,
        adapter_alpha: int = 16,
        adapter_dropout: float = 0.05,
        adapter_targets: str = QUERY_VALUE,
        history_length: int = 10,
        title_tokens: int = 12,
        adapter_learning_rate: float = 3e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            llm=llm,
            num_layers=num_layers,
            form="list",
            template=template,
            rank_mode=rank_mode,
            adapter_rank=adapter_rank,
            adapter_alpha=adapter_alpha,
            adapter_dropout=adapter_dropout,
            adapter_targets=adapter_targets,
            user_token=False,
            item_tokens=False,
            semantic_token=False,
            residual=False,
            history_length=history_length,
            title_tokens=title_tokens,
            adapter_learning_rate=adapter_learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            precision=precision,
            activation_checkpointing=activation_checkpointing,
            seed=seed,
        )


class TALLRecBinary(_Instructed):
    """TALLRec's own task: liked and disliked titles, one more title, "Yes" or "No" (arXiv 2305.00447).

    The score of a title is P(Yes) / (P(Yes) + P(No)) at the answer's token; the loss is the cross-entropy of that one
    token over the vocabulary. Where " Yes" and " No" are spelled in several tokens, the answer's token is the first one
    in which they differ, and what they share belongs to the prompt. Titles to be judged are branches after the shared
    history, so one is judged as if the others were not there.

    Reads the batches of :class:`~lightning_sfubm.datamodules.preference_datamodule.PreferenceDataModule` and logs
    ``val/auc`` and ``test/auc``. As a ``Ranker`` it scores the candidates one by one; nothing is then said to be
    disliked, as in the published data where a user has disliked nothing.

    Args:
        llm: as for :class:`TALLRec`, like all the others.
        num_layers: see there.
        template: see there.
        adapter_rank: see there.
        adapter_alpha: see there.
        adapter_dropout: see there.
        adapter_targets: see there.
        history_length: see there.
        title_tokens: see there.
        adapter_learning_rate: see there.
        weight_decay: see there.
        warmup: see there.
        precision: see there.
        activation_checkpointing: see there.
        seed: see there.

    Example:
        >>> data = PreferenceDataModule(domain, shots=64)
        >>> head = TALLRecBinary.from_head(llm_head.hparams)
        >>> head.attach_stage1(None, data.catalogue)
        >>> trainer.fit(head, datamodule=data)
        >>> trainer.test(head, datamodule=data)                 # test/auc
    """

    def __init__(
        self,
        llm: str = "smollm2-135m",
        num_layers: int | None = None,
        template: str = "shopping",
        adapter_rank: int = 8,
        adapter_alpha: int = 16,
        adapter_dropout: float = 0.05,
        adapter_targets: str = QUERY_VALUE,
        history_length: int = 10,
        title_tokens: int = 12,
        adapter_learning_rate: float = 3e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            llm=llm,
            num_layers=num_layers,
            form="branch",  # without a head: branches are scored by the words that follow them
            template=template,
            rank_mode="score",
            adapter_rank=adapter_rank,
            adapter_alpha=adapter_alpha,
            adapter_dropout=adapter_dropout,
            adapter_targets=adapter_targets,
            user_token=False,
            item_tokens=False,
            semantic_token=False,
            residual=False,
            history_length=history_length,
            title_tokens=title_tokens,
            adapter_learning_rate=adapter_learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            precision=precision,
            activation_checkpointing=activation_checkpointing,
            seed=seed,
        )
        self.template = load_template(template, "binary")
        self.auc = nn.ModuleDict({stage: BinaryAUROC() for stage in ("val", "test")})

    def _answer_states(self, batch: PreferenceBatch | RankBatch) -> Tensor:
        """States (B, C, hidden_dim) at the answer's place behind each of the titles ``candidates`` (B, C)."""
        disliked = cast(Any, batch).get("disliked")  # a RankBatch has none
        self._fit_context(batch["candidates"].shape[1], 0 if disliked is None else disliked.shape[1])
        prompts = self.prompts.build(batch["history"], batch["candidates"], disliked=disliked).to(self.device)
        states = self._states(prompts, self.lm.embed(prompts.tokens))
        return states.gather(1, prompts.branch_end.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    def forward(self, batch: PreferenceBatch | RankBatch) -> Tensor:  # type: ignore[override]
        """P(Yes) / (P(Yes) + P(No)) of each title, (B, C) in [0, 1]."""
        states, answers = self._answer_states(batch), list(self.prompts.answer_ids)
        if any(getattr(self.lm.config, name, None) is not None for name in RESCALED):
            yes, no = self.lm.logits(states)[..., answers].unbind(-1)
        else:
            # Two rows of the vocabulary head, in fp32: logits in bf16 are so coarse that titles would tie.
            head = self.lm.causal_lm.get_output_embeddings()
            bias = None if head.bias is None else head.bias[answers].float()
            yes, no = F.linear(states, head.weight[answers].float(), bias).unbind(-1)
        return torch.sigmoid(yes - no)

    def loss(self, batch: PreferenceBatch) -> Tensor:  # type: ignore[override]
        """Cross-entropy of the answer's token."""
        answers = torch.where(batch["labels"] > 0, *self.prompts.answer_ids)
        return F.cross_entropy(self.lm.logits(self._answer_states(batch)).flatten(0, 1), answers.flatten())

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """Loss of a batch.

        Raises:
            ConfigError: the batch has no labels.
        """
        _check_labels(batch)
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["user"]))
        return mean_over_ranks(loss, len(batch["user"]))

    def _evaluate(self, stage: str, batch: Any) -> None:
        _check_labels(batch)
        metric: Any = self.auc[stage]
        metric.update(self.rank(batch).flatten(), batch["labels"].flatten())
        self.log(f"{stage}/auc", metric, on_step=False, on_epoch=True, batch_size=len(batch["user"]))


def _check_labels(batch: PreferenceBatch) -> None:
    if "labels" not in batch:
        raise ConfigError(
            "TALLRecBinary judges titles by Yes and No, which these data do not label: use lightning_sfubm.datamodules."
            "preference_datamodule.PreferenceDataModule over the domain"
        )
