"""The LLM stage: a causal LM ranks candidates, reading titles and, through soft tokens, what stage 1 has learned."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_sfubm.contracts import RankBatch
from lightning_sfubm.datamodules.prompt_templates import load_template
from lightning_sfubm.datamodules.prompts import PromptBuilder
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.metrics import candidate_ranks, ranking_metrics
from lightning_sfubm.modules.layers.affinity import num_products, with_products
from lightning_sfubm.modules.layers.modes import evaluating
from lightning_sfubm.modules.llm.calibration import fit_factor
from lightning_sfubm.modules.llm.list_ranking import branch_log_likelihood
from lightning_sfubm.modules.llm.optim import adamw_with_warmup
from lightning_sfubm.modules.llm.ranking import RankingLM, in_own_precision
from lightning_sfubm.modules.llm.sharding import settle, whole
from lightning_sfubm.modules.losses.ranks import mean_over_ranks
from lightning_sfubm.ranks import needs_every_gradient
from lightning_sfubm.seeds import step_of, torch_generator

RANK_MODES = {"branch": ("head", "score"), "list": ("score", "generate", "constrained")}


def _check_candidates(batch: RankBatch, doing: str, entry: str = "target_index") -> None:
    if entry not in batch:
        raise ConfigError(
            f"an LLM {doing} among candidates, which these data do not give: use lightning_sfubm.datamodules."
            "ranking_datamodule.RankingDataModule over the domain"
        )


class LLMHead(RankingLM):
    """Ranks candidates with a causal LM, tuned by LoRA or frozen, with soft tokens from a frozen stage 1.

    ``branch`` form [choice]: after a shared prefix (user soft token, latest titles and their soft tokens, the
    question) each candidate is an isolated branch; its score is a linear head (zero at the start) on the state at
    the end of the branch, plus ``sum_f a_f z_f``, the learned residual on the standardised stage-1 affinities
    (``a = [1, 0, ...]`` at the start). So an untrained head ranks exactly as stage 1 does. Trained by cross-entropy
    over the candidates. ``list`` form: the candidates stand in the prompt and the answer is a title, trained by
    cross-entropy on the answer's tokens only.

    Checkpoints hold the trainable parameters only (adapters, projectors, head, residual); loading rebuilds the base
    model from ``llm`` and refuses another one. Stage 1 is attached, never stored.

    Args:
        llm: an embedded default (``smollm2-135m``), a local folder or a hub id.
        num_layers: use the first n decoder layers only; ``None`` uses all.
        form: ``branch`` or ``list``.
        template: a shipped prompt template or the path of a YAML file.
        rank_mode: ``head`` or ``score`` (``branch``); ``score``, ``generate`` or ``constrained`` (``list``).
            ``None``: ``head`` / ``score``. ``score`` is the length-normalised log-likelihood of the title; untrained,
            it is the zero-shot LLM.
        subtract_prior: ``score`` minus the same title's likelihood under the question without a history.
        tuning: ``lora`` or ``frozen`` (projectors, head and residual still train).
        adapter_rank: LoRA rank (arXiv 2106.09685).
        adapter_alpha: LoRA alpha.
        adapter_dropout: LoRA dropout.
        adapter_targets: ``all-linear`` or a regular expression over module names.
        user_token: inject the user state.
        item_tokens: inject ID embeddings.
        semantic_token: inject semantic embeddings.
        affinity_token: add the standardised affinities to the candidates' soft tokens.
        residual: add the residual on the affinities (``branch`` with ``head``).
        count_affinities: affinities of words and buyers in common and of popularity besides those of stage 1; see
            :class:`~lightning_sfubm.modules.layers.count_affinity.CountAffinities`.
        residual_products: weigh products of affinities in the residual besides, as
            :class:`~lightning_sfubm.modules.baselines.late_fusion.LateFusion` with ``products`` does.
        history_length: the newest items that are mentioned.
        title_tokens: longest title.
        curriculum: share of the training steps over which prompts move from text-only to hybrid, 0 for none
            (LLaRA, arXiv 2312.02445).
        adapter_learning_rate: of the adapters.
        head_learning_rate: of head and residual.
        projector_learning_rate: of the projectors.
        weight_decay: of adapters and projectors.
        warmup: share of the training steps with rising learning rate; it falls linearly to zero afterwards.
        stage1_checkpoint: checkpoint of a stage-1 module, loaded when the catalogue is known.
        projector_checkpoint: checkpoint of a :class:`~lightning_sfubm.modules.prompt_projector.PromptProjector`.
        precision: ``auto``, ``bf16``, ``32``, ``8bit`` or ``4bit`` (the last two: a quantised base, extra ``quantized``);
            holds for training and inference under any Trainer precision.
        activation_checkpointing: compute each decoder layer a second time in training rather than keep what it computed: less
            memory, about a third more time.
        seed: root seed of initial values and of the curriculum.

    Example:
        >>> head = LLMHead(template="movies", num_layers=15)
        >>> head.attach_stage1(stage1, catalogue)                    # or attach_stage1(None, catalogue): text only
        >>> scores = head.rank(batch)                                # (B, C)
    """

    def __init__(
        self,
        llm: str = "smollm2-135m",
        num_layers: int | None = None,
        form: str = "branch",
        template: str = "shopping",
        rank_mode: str | None = None,
        subtract_prior: bool = False,
        tuning: str = "lora",
        adapter_rank: int = 8,
        adapter_alpha: int = 32,
        adapter_dropout: float = 0.1,
        adapter_targets: str = "all-linear",
        user_token: bool = True,
        item_tokens: bool = True,
        semantic_token: bool = True,
        affinity_token: bool = False,
        residual: bool = True,
        count_affinities: bool = False,
        residual_products: bool = False,
        history_length: int = 10,
        title_tokens: int = 12,
        curriculum: float = 0.0,
        adapter_learning_rate: float = 3e-4,
        head_learning_rate: float = 3e-3,
        projector_learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        stage1_checkpoint: str | None = None,
        projector_checkpoint: str | None = None,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        if form not in RANK_MODES:
            raise ConfigError(f"prompt form '{form}' is not one of {sorted(RANK_MODES)}")
        prompt = load_template(template, form)
        if tuning not in ("lora", "frozen"):
            raise ConfigError(f"tuning '{tuning}' is not one of lora, frozen")
        if tuning == "lora" and adapter_rank < 1:
            raise ConfigError(f"adapter_rank must be at least 1 with tuning 'lora', got {adapter_rank}")
        if not 0.0 <= curriculum <= 1.0:
            raise ConfigError(f"curriculum is a share of the training steps in [0, 1], got {curriculum}")
        rank_mode = rank_mode or RANK_MODES[form][0]
        if rank_mode not in RANK_MODES[form]:
            raise ConfigError(f"rank_mode '{rank_mode}' is not one of {RANK_MODES[form]} for form '{form}'")
        if subtract_prior and rank_mode != "score":
            raise ConfigError(
                f"subtract_prior is of title likelihoods, which rank_mode '{rank_mode}' has none of: set rank_mode to score"
            )
        super().__init__(prompt, rank_mode)
        self.save_hyperparameters()
        self.head: nn.Linear | None = None
        self.residual_weights: nn.Parameter | None = None
        self.metrics = nn.ModuleDict({stage: ranking_metrics(f"{stage}/") for stage in ("val", "test")})

    # ------------------------------------------------------------------------------------------------ forward

    def build_output(self, num_affinities: int) -> None:
        """The linear head, zero at the start, and the residual that starts as stage 1's own score."""
        if self.rank_mode != "head":
            return
        self.head = nn.Linear(self.lm.hidden_dim, 1, bias=False, device=self.device)
        nn.init.zeros_(self.head.weight)
        if num_affinities and self.settings.residual:
            terms = num_products(num_affinities) if self.settings.residual_products else num_affinities
            self.residual_weights = nn.Parameter(torch.zeros(terms, device=self.device))
            nn.init.ones_(self.residual_weights.data[:1])

    def _builder(self) -> PromptBuilder:
        """Curriculum: some of the prompts that train are of text alone."""
        text_only = self.training and self.settings.curriculum > 0 and self._draws_text_only()
        return self.text_prompts if text_only else super()._builder()

    def _draws_text_only(self) -> bool:
        """Curriculum: the chance of a text-only prompt falls linearly from 1 to 0."""
        total = self.trainer.estimated_stepping_batches * self.settings.curriculum
        progress = min(1.0, self.global_step / max(1.0, total))
        draw = torch.rand((), generator=torch_generator(self.settings.seed, "curriculum", *step_of(self)))
        return draw.item() >= progress

    def init_residual(self, weights: Tensor) -> None:
        """Set the residual's weights, one per affinity (and product), for instance those of a late fusion fitted beforehand."""
        if self.residual_weights is None:
            raise ConfigError(
                "this head has no residual: it needs an attached stage 1, residual=True and rank_mode head"
            )
        if weights.shape != self.residual_weights.shape or not torch.isfinite(weights).all():
            raise ConfigError(
                f"residual weights must be finite and of shape {tuple(self.residual_weights.shape)} "
                f"({', '.join(self._shape[1] if self._shape else ())}), got shape {tuple(weights.shape)}"
            )
        with torch.no_grad():
            self.residual_weights.copy_(weights)

    def start_from(self, text: Mapping[str, Tensor]) -> None:
        """Take adapters and output of a head that was tuned on text alone; projectors and residual stay as they are.

        Args:
            text: trainable parameters of that head by name.

        Raises:
            ConfigError: naming the first parameter that this head has not, or in another shape.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        for name, value in text.items():
            if name not in own or own[name].shape != value.shape:
                raise ConfigError(f"the text head's parameter '{name}' {tuple(value.shape)} has no place in this head")
        with torch.no_grad():
            for name, value in text.items():
                own[name].copy_(value)

    def _residual(self, affinities: Tensor, weights: Tensor) -> Tensor:
        """(B, C) weighted sum of the affinities (B, C, F), or of them and their products."""
        return (with_products(affinities) if self.settings.residual_products else affinities) @ weights

    @in_own_precision
    def forward(self, batch: RankBatch) -> Tensor:
        """Differentiable scores (B, C) by the head or by title likelihood."""
        affinities = self._affinities(batch)
        prompts = self._build(batch)
        states = self._states(prompts, self._embed(prompts, batch, affinities))
        if self.head is None:
            sums, counts = branch_log_likelihood(self.lm, states, prompts)
            return sums / counts.clamp_min(1)
        ends = states.gather(1, prompts.branch_end.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        scores = self.head(ends).squeeze(-1).float()
        if self.residual_weights is not None and affinities is not None:
            scores = scores + self._residual(affinities, self.residual_weights)
        return scores

    def loss(self, batch: RankBatch) -> Tensor:
        """Cross-entropy over the candidates (``branch``) or on the answer's tokens (``list``)."""
        return self._loss_and_terms(batch)[0]

    @in_own_precision
    def _loss_and_terms(self, batch: RankBatch) -> tuple[Tensor, int]:
        """The loss and the number of terms it is the mean of: samples, or tokens of their answers."""
        if self.settings.form == "branch":
            return F.cross_entropy(self(batch), batch["target_index"]), len(batch["target_index"])
        prompts = self._build(batch, branches=batch["target"].unsqueeze(1))
        states = self._states(prompts, self._embed(prompts, batch, self._affinities(batch)))
        sums, counts = branch_log_likelihood(self.lm, states, prompts)
        return -sums.sum() / counts.sum(), int(counts.sum())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[RankBatch]) -> float:
        """Scale what the LLM adds to the residual by the factor that fits validation data best.

        Tuned on a few hundred samples, the head is surer of itself than it should be. One number, chosen by conditional
        likelihood over users it was not tuned on, puts that right; it is 0 where the LLM adds nothing [choice].

        Args:
            batches: validation samples.

        Returns:
            The factor, at least 0; the head's weights are multiplied by it.

        Raises:
            ConfigError: this head has no residual, so there is nothing to weigh it against.
        """
        if self.head is None or self.residual_weights is None:
            raise ConfigError("only a head with a residual can be calibrated (form branch, rank_mode head, stage 1)")
        added, base, targets = [], [], []
        weights = whole(self.residual_weights)
        with evaluating(self), torch.no_grad():
            for given in batches:
                batch: RankBatch = move_data_to_device(given, self.device)
                affinities = self._affinities(batch)
                assert affinities is not None
                base.append(self._residual(affinities, weights))
                added.append(self(batch) - base[-1])
                targets.append(batch["target_index"])
        factor = fit_factor(torch.cat(base), torch.cat(added), torch.cat(targets))
        settle(self)
        self.head.weight.mul_(factor)
        return factor

    # ------------------------------------------------------------------------------------------------ Lightning

    def on_fit_start(self) -> None:
        """Refuse a training in which the curriculum cannot do what it is for.

        Raises:
            ConfigError: there is a curriculum, but no end of the training to measure its share by, or a strategy that takes no
                step without a gradient of every parameter.
        """
        if not self.settings.curriculum or self.projector is None:
            return
        if needs_every_gradient(self.trainer.strategy):
            raise ConfigError(
                "a curriculum leaves the projectors out of some steps, which trainer.strategy does not look for: set it to "
                "ddp_find_unused_parameters_true, or curriculum to 0"
            )
        if not math.isfinite(self.trainer.estimated_stepping_batches):
            raise ConfigError(
                "curriculum is a share of the training steps, and their number is unknown: set trainer.max_epochs or "
                "trainer.max_steps, or curriculum to 0"
            )

    def training_step(self, batch: RankBatch, batch_idx: int) -> Tensor:
        """Loss of a batch.

        Raises:
            ConfigError: the batch has no candidates.
        """
        _check_candidates(batch, "is tuned")
        self._prior = None
        loss, terms = self._loss_and_terms(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["target"]))
        if self.residual_weights is not None:
            self.log("train/residual", self.residual_weights[0], batch_size=len(batch["target"]))
        return mean_over_ranks(loss, terms)

    def _evaluate(self, stage: str, batch: RankBatch) -> None:
        _check_candidates(batch, "is evaluated")
        scores, _, _ = self._rank(batch)
        metrics: Any = self.metrics[stage]
        metrics.update(candidate_ranks(scores, batch["target_index"]))  # an invalid answer has equal scores: a miss
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(scores))

    def validation_step(self, batch: RankBatch, batch_idx: int) -> None:
        """Log ``val/hit@1``, ``val/ndcg@10`` and the like over the candidates.

        Raises:
            ConfigError: the batch has no candidates.
        """
        self._evaluate("val", batch)

    def test_step(self, batch: RankBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: RankBatch, batch_idx: int) -> Tensor:
        """Scores (B, C).

        Raises:
            ConfigError: the batch has no candidates: an LLM scores those it is given.
        """
        _check_candidates(batch, "predicts", "candidates")
        return self.rank(batch)

    def configure_optimizers(self) -> Any:
        """AdamW; one group each for adapters, projectors, head with residual; linear warm-up and decay."""
        hp = self.settings
        groups: dict[str, tuple[Callable[[str], bool], float, float]] = {
            "adapters": (lambda n: n.startswith("backbone."), hp.adapter_learning_rate, hp.weight_decay),
            "projectors": (lambda n: n.startswith("projector."), hp.projector_learning_rate, hp.weight_decay),
            "head": (lambda n: n.startswith(("head.", "residual_")), hp.head_learning_rate, 0.0),
        }
        return adamw_with_warmup(self, groups, hp.warmup)
