"""Ranking with an LLM: by a score of its own, by the likelihood of titles, or by the title that it answers."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_sfubm.contracts import RankBatch
from lightning_sfubm.datamodules.prompt_batch import PromptBatch
from lightning_sfubm.datamodules.prompt_templates import PromptTemplate
from lightning_sfubm.datamodules.prompts import PromptBuilder
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.parsing import TitleParser
from lightning_sfubm.modules.layers.modes import evaluating
from lightning_sfubm.modules.llm.injected import InjectedLM
from lightning_sfubm.modules.llm.list_ranking import TitleTrie, branch_log_likelihood, greedy
from lightning_sfubm.modules.llm.sharding import is_sharded
from lightning_sfubm.modules.losses.ranks import any_rank, least_over_ranks, union_over_ranks

T = TypeVar("T")


def in_own_precision(method: Callable[..., T]) -> Callable[..., T]:
    """Keep a trainer's autocast out: the head has a ``precision`` of its own."""

    @wraps(method)
    def wrapped(self: "RankingLM", *args: Any, **kwargs: Any) -> T:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


class RankingLM(InjectedLM):
    """Base of :class:`~lightning_sfubm.modules.llm_head.LLMHead`: ranking, and title priors that are kept while they hold.

    A sub-class scores the candidates (B, C) in ``forward``.

    Args:
        template: texts of the prompt form.
        rank_mode: ``head``, ``score``, ``generate`` or ``constrained``.
    """

    def __init__(self, template: PromptTemplate, rank_mode: str) -> None:
        super().__init__(template)
        self.rank_mode = rank_mode
        self._prior: Tensor | None = None

    def _build(self, batch: RankBatch, **options: Any) -> PromptBatch:
        if self.catalogue is None:
            raise ConfigError("the LLM head has no catalogue yet; call attach_stage1(stage1 or None, catalogue)")
        self._fit_context(batch["candidates"].shape[1])
        return self._builder().build(batch["history"], batch["candidates"], **options).to(self.device)

    def _builder(self) -> PromptBuilder:
        """What writes the prompts of a batch."""
        return self.prompts

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C). ``generate`` and ``constrained`` give 1 to the chosen candidate and 0 to the others."""
        return self._rank(batch)[0]

    def rank_with_validity(self, batch: RankBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, C), chosen candidate (B,), whether the answer named exactly one candidate (B,) bool.

        An invalid answer has choice 0 and scores 0; only ``generate`` can give one.
        """
        return self._rank(batch)

    @in_own_precision
    def _rank(self, batch: RankBatch) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(batch["candidates"])
        if rows == 0 and not is_sharded(self):
            none = batch["candidates"][:, 0]
            return batch["candidates"].float(), none, none.bool()
        if rows == 0:
            # The other ranks gather the parameters: take part with a row of item 1, and leave its answer out.
            stand_in: Any = {name: value.new_ones(1, *value.shape[1:]) for name, value in batch.items()}  # type: ignore[attr-defined]
            scores, choice, valid = self._rank(stand_in)
            return scores[:0], choice[:0], valid[:0]
        with evaluating(self), torch.no_grad():
            if self.rank_mode in ("generate", "constrained"):
                scores = self._answer(batch)
                return scores, scores.argmax(1), scores.any(1)
            scores = self(batch)
            if self.settings.subtract_prior and self.rank_mode == "score":
                scores = scores - self._priors(batch["candidates"])
            return scores, scores.argmax(1), torch.ones(len(scores), dtype=torch.bool, device=scores.device)

    def _priors(self, candidates: Tensor) -> Tensor:
        """(B, C) length-normalised likelihoods without a history, computed once per item until training goes on."""
        if self._prior is None:
            self._prior = torch.full((self.prompts.num_items + 1,), float("nan"), device=self.device)
        missing = candidates[self._prior[candidates].isnan()]
        # A divided model computes in step: every rank takes the items that any of them needs.
        missing = union_over_ranks(missing, len(self._prior)) if is_sharded(self) else torch.unique(missing)
        for items in missing.split(64) if len(missing) else ():
            row = items.unsqueeze(0)
            prompts = self.text_prompts.build(row.new_zeros(1, 1), row[:, :0], row, with_history=False).to(self.device)
            states = self._states(prompts, self.lm.embed(prompts.tokens))
            sums, counts = branch_log_likelihood(self.lm, states, prompts)
            self._prior[items] = (sums / counts.clamp_min(1))[0]
        return self._prior[candidates]

    def _answer(self, batch: RankBatch) -> Tensor:
        """(B, C) 1 for what a generated answer names, else 0.

        That is one candidate, none where the answer is invalid, or all that have the answer in common, a tie, where it was
        constrained to candidates' titles and some of these are cut to the same tokens.
        """
        prompts = self._build(batch, branches=batch["target"].new_zeros(len(batch["target"]), 0))
        embeddings = self._embed(prompts, batch, self._affinities(batch))
        tokenizer = self.lm.tokenizer
        candidates = batch["candidates"].cpu().numpy()
        tries = None
        if self.rank_mode == "constrained":
            tries = [TitleTrie(answers) for answers in self.prompts.answers(candidates)]
        length = max(self.settings.title_tokens + 4, self.prompts.longest_answer)
        context = getattr(self.lm.config, "max_position_embeddings", None)
        if tries is None and context is not None:  # a title fits, what else may be said need not
            length = max(1, min(length, int(context) - prompts.tokens.shape[1]))
            if is_sharded(self):  # all ranks take part in every step
                length = least_over_ranks(length, self.device)
        anyone = partial(any_rank, device=self.device) if is_sharded(self) else bool
        answers = greedy(self.lm, embeddings, prompts, length, tokenizer.eos_token_id, tries, anyone)
        if tries is not None:
            picked = [trie.candidates(answer) for trie, answer in zip(tries, answers, strict=True)]
        else:
            titles, cut = self.prompts.spoken_titles
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            parsers = [TitleParser([titles[i] for i in row], [cut[i] for i in row]) for row in candidates]
            said = [parser.parse(text) for parser, text in zip(parsers, texts, strict=True)]
            picked = [[] if index is None else [index] for index in said]
        scores = torch.zeros(candidates.shape)
        for row, indices in enumerate(picked):
            scores[row, indices] = 1.0
        return scores.to(self.device)

    # ------------------------------------------------------------------------------------------------ forgetting priors

    def train(self, mode: bool = True) -> Self:
        """As ever; entering training forgets the cached title priors."""
        if mode:
            self._prior = None
        return super().train(mode)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`InjectedLM.load_state_dict`; other weights have other title priors."""
        self._prior = None
        return super().load_state_dict(state_dict, strict, assign)

    def _build_prompts(self) -> None:
        self._prior = None  # of another catalogue
        super()._build_prompts()

    def _fit_context(self, num_candidates: int, num_disliked: int = 0) -> None:
        before = self._fitted
        super()._fit_context(num_candidates, num_disliked)
        if self._fitted != before:
            self._prior = None  # titles may be cut

    def on_validation_start(self) -> None:
        """Forget the title priors: Lightning moves weights without a call of :meth:`train`."""
        self._prior = None

    on_test_start = on_predict_start = on_validation_start
