"""The LLM stage: a causal LM ranks candidates, reading titles and, through soft tokens, what stage 1 has learned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch, Stage1
from lightning_sfubm.datamodules.prompt_templates import load_template
from lightning_sfubm.datamodules.prompts import CANDIDATE, USER, PromptBatch, PromptBuilder
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.evaluation.metrics import candidate_ranks, ranking_metrics
from lightning_sfubm.evaluation.parsing import TitleParser
from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.list_ranking import TitleTrie, branch_log_likelihood, greedy
from lightning_sfubm.modules.llm.optim import adamw_with_warmup
from lightning_sfubm.modules.llm.projection import TokenProjector, standardise
from lightning_sfubm.modules.llm.splice import splice
from lightning_sfubm.modules.llm.stage1 import load_stage1
from lightning_sfubm.modules.llm.tree import separate_states, supports_tree, tree_states
from lightning_sfubm.seeds import seeded, torch_generator

RANK_MODES = {"branch": ("head", "score"), "list": ("score", "generate", "constrained")}


class _Loaded(NamedTuple):
    """What an incompatible-keys answer looks like when all keys fit."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class LLMHead(L.LightningModule):
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
        precision: ``auto``, ``bf16`` or ``32``; holds for training and inference under any Trainer precision.
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
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tuning not in ("lora", "frozen"):
            raise ConfigError(f"tuning '{tuning}' is not one of lora, frozen")
        if tuning == "lora" and adapter_rank < 1:
            raise ConfigError(f"adapter_rank must be at least 1 with tuning 'lora', got {adapter_rank}")
        if not 0.0 <= curriculum <= 1.0:
            raise ConfigError(f"curriculum is a share of the training steps in [0, 1], got {curriculum}")
        prompt = load_template(template, form)
        rank_mode = rank_mode or RANK_MODES[form][0]
        if rank_mode not in RANK_MODES[form]:
            raise ConfigError(f"rank_mode '{rank_mode}' is not one of {RANK_MODES[form]} for form '{form}'")
        self.save_hyperparameters()
        self.rank_mode = rank_mode
        self.template = prompt
        self.backbone: Backbone | None = None
        self.projector: TokenProjector | None = None
        self.head: nn.Linear | None = None
        self.residual_weights: nn.Parameter | None = None
        self.catalogue: Catalogue | None = None
        self.metrics = nn.ModuleDict({stage: ranking_metrics(f"{stage}/") for stage in ("val", "test")})
        self._stage1: list[Any] = []  # a list keeps the module out of our parameters, checkpoints and modes
        self._shape: tuple[int, tuple[str, ...]] | None = None  # H and the affinity names of stage 1
        self._tree = True
        self._prior: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ assembly

    def configure_model(self) -> None:
        """Load the base model (once). Called by Lightning, by :meth:`attach_stage1` and on loading a checkpoint."""
        if self.backbone is not None:
            return
        hp = self.hparams
        with seeded(hp.seed, "llm", "adapters"):
            self.backbone = Backbone(
                hp.llm,
                hp.num_layers,
                hp.precision,
                hp.adapter_rank if hp.tuning == "lora" else 0,
                hp.adapter_alpha,
                hp.adapter_dropout,
                hp.adapter_targets,
            )
        self._tree = supports_tree(self.backbone)
        if self.rank_mode == "head":
            self.head = nn.Linear(self.backbone.hidden_dim, 1, bias=False)
            nn.init.zeros_(self.head.weight)

    def attach_stage1(self, stage1: Stage1 | None, catalogue: Catalogue) -> None:
        """Give the head its domain: the frozen stage 1 (``None`` for text-only methods) and the catalogue.

        Item tables are read here, once: attach again after stage 1 has changed.

        Raises:
            CheckpointError: if this head was loaded from a checkpoint that belongs to another stage 1.
        """
        self.configure_model()
        self.catalogue = catalogue
        self._stage1 = [] if stage1 is None else [stage1]
        if stage1 is not None:
            if isinstance(stage1, nn.Module):
                stage1.eval()
            shape = (int(stage1.hidden_dim), tuple(stage1.affinity_names))
        else:
            shape = (0, ())
        if self._shape is not None and self._shape != shape:
            raise CheckpointError(
                f"this LLM head was trained on a stage 1 with (hidden_dim, affinities) {self._shape}, got {shape}"
            )
        self._build_trainables(*shape)
        if stage1 is not None:
            with torch.no_grad():
                ids, semantics = stage1.item_tables()
            self.register_buffer("id_table", ids.detach().float().to(self.device), persistent=False)
            self.register_buffer("semantic_table", semantics.detach().float().to(self.device), persistent=False)
        self._build_prompts()

    def _build_trainables(self, hidden_dim: int, affinity_names: tuple[str, ...]) -> None:
        """Projectors and residual for a stage 1 of this shape (H = 0: none). Keeps those already there."""
        if self._shape is not None:
            return
        hp = self.hparams
        assert self.backbone is not None
        self._shape = (hidden_dim, affinity_names)
        if hidden_dim == 0:
            return
        affinities = len(affinity_names) if hp.affinity_token else 0
        if hp.user_token or hp.item_tokens or hp.semantic_token or affinities:
            with seeded(hp.seed, "llm", "projectors"):
                self.projector = TokenProjector(
                    hidden_dim,
                    self.backbone.embedding_dim,
                    self.backbone.token_norm,
                    hp.user_token,
                    hp.item_tokens,
                    hp.semantic_token,
                    affinities,
                ).to(self.device)
            if hp.projector_checkpoint:
                self._load_projector(hp.projector_checkpoint)
        if hp.residual and self.rank_mode == "head":
            self.residual_weights = nn.Parameter(torch.eye(len(affinity_names), device=self.device)[0].clone())

    def _load_projector(self, path: str) -> None:
        assert self.projector is not None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            own = self.projector.state_dict()
            aligned = {k.removeprefix("tokens."): v for k, v in state.items() if k.startswith("tokens.")}
            self.projector.load_state_dict({**own, **{k: v for k, v in aligned.items() if k in own}})
        except (OSError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"projector checkpoint {path} does not fit this head: {reason}") from error

    def _build_prompts(self) -> None:
        hp = self.hparams
        assert self.backbone is not None and self.catalogue is not None
        soft = self.projector is not None
        in_items = soft and (hp.item_tokens or hp.semantic_token)
        titles = self.catalogue.titles
        shared = (self.backbone.tokenizer, self.template, titles, hp.history_length, hp.title_tokens)
        self.prompts = PromptBuilder(
            *shared, soft and hp.user_token, in_items, in_items or (soft and hp.affinity_token)
        )
        self.text_prompts = PromptBuilder(*shared, False, False, False) if soft and hp.curriculum > 0 else None
        self._prior = None

    def init_residual(self, weights: Tensor) -> None:
        """Set the residual's weights (F,), one per affinity, for instance those of a late fusion fitted beforehand."""
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

    def setup(self, stage: str) -> None:
        """Take catalogue and stage 1 from the datamodule and ``stage1_checkpoint`` where nothing was attached."""
        if self.catalogue is None:
            catalogue = getattr(getattr(self.trainer, "datamodule", None), "catalogue", None)
            if catalogue is None:
                raise ConfigError("the LLM head needs a datamodule with a catalogue, or attach_stage1() before the run")
            path = self.hparams.stage1_checkpoint
            self.attach_stage1(load_stage1(path, catalogue) if path else None, catalogue)

    # ------------------------------------------------------------------------------------------------ forward

    def _affinities(self, batch: RankBatch) -> Tensor | None:
        """(B, C, F) standardised affinities of stage 1, or ``None`` without one."""
        if not self._stage1:
            return None
        with torch.no_grad():
            return standardise(self._device_stage1().affinities(batch))

    def _device_stage1(self) -> Any:
        stage1 = self._stage1[0]
        if isinstance(stage1, nn.Module):
            stage1.to(self.device).eval()
        return stage1

    def _embed(self, prompts: PromptBatch, batch: RankBatch, affinities: Tensor | None) -> Tensor:
        """Token embeddings (B, S, d) with the soft tokens in their places."""
        assert self.backbone is not None
        embeddings = self.backbone.embed(prompts.tokens)
        places = prompts.tokens < 0
        if not places.any():
            return embeddings
        assert self.projector is not None
        codes = prompts.tokens[places]
        rows = places.nonzero()[:, 0]
        items, slots = prompts.items[places], prompts.slots[places]
        vectors = embeddings.new_zeros(len(codes), embeddings.shape[-1])
        is_user = codes == USER
        if is_user.any():
            with torch.no_grad():
                states = self._device_stage1().user_states(batch).float()
            vectors = vectors.index_put((is_user.nonzero().flatten(),), self.projector.users(states)[rows[is_user]])
        of_item = (~is_user).nonzero().flatten()
        used, inverse = torch.unique(items[of_item], return_inverse=True)
        soft = self.projector.items(self.id_table[used], self.semantic_table[used])[inverse]
        vectors = vectors.index_put((of_item,), soft)
        if self.projector.affinity_map is not None and affinities is not None:
            chosen = (codes == CANDIDATE).nonzero().flatten()
            extra = self.projector.affinities(affinities[rows[chosen], slots[chosen]])
            vectors = vectors.index_put((chosen,), extra, accumulate=True)
        return splice(embeddings, places, vectors)

    def _states(self, prompts: PromptBatch, batch: RankBatch, affinities: Tensor | None) -> Tensor:
        assert self.backbone is not None
        embeddings = self._embed(prompts, batch, affinities)
        return (tree_states if self._tree else separate_states)(self.backbone, embeddings, prompts)

    def _build(self, batch: RankBatch, **options: Any) -> PromptBatch:
        if self.catalogue is None:
            raise ConfigError("the LLM head has no catalogue yet; call attach_stage1(stage1 or None, catalogue)")
        builder = self.prompts
        if self.training and self.text_prompts is not None and self._draws_text_only():
            builder = self.text_prompts
        return builder.build(batch["history"], batch["candidates"], **options).to(self.device)

    def _draws_text_only(self) -> bool:
        """Curriculum: the chance of a text-only prompt falls linearly from 1 to 0."""
        total = self.trainer.estimated_stepping_batches * self.hparams.curriculum
        progress = min(1.0, self.global_step / max(1.0, total))
        draw = torch.rand((), generator=torch_generator(self.hparams.seed, "curriculum", self.global_step))
        return draw.item() >= progress

    def forward(self, batch: RankBatch) -> Tensor:
        """Differentiable scores (B, C) by the head or by title likelihood."""
        affinities = self._affinities(batch)
        prompts = self._build(batch)
        states = self._states(prompts, batch, affinities)
        if self.head is None:
            assert self.backbone is not None
            sums, counts = branch_log_likelihood(self.backbone, states, prompts)
            return sums / counts.clamp_min(1)
        ends = states.gather(1, prompts.branch_end.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        scores = self.head(ends).squeeze(-1).float()
        if self.residual_weights is not None and affinities is not None:
            scores = scores + affinities @ self.residual_weights
        return scores

    def loss(self, batch: RankBatch) -> Tensor:
        """Cross-entropy over the candidates (``branch``) or on the answer's tokens (``list``)."""
        if self.hparams.form == "branch":
            return F.cross_entropy(self(batch), batch["target_index"])
        assert self.backbone is not None
        affinities = self._affinities(batch)
        prompts = self._build(batch, branches=batch["target"].unsqueeze(1))
        sums, counts = branch_log_likelihood(self.backbone, self._states(prompts, batch, affinities), prompts)
        return -sums.sum() / counts.sum()

    # ------------------------------------------------------------------------------------------------ ranking

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C). ``generate`` and ``constrained`` give 1 to the chosen candidate and 0 to the others."""
        return self._rank(batch)[0]

    def rank_with_validity(self, batch: RankBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, C), chosen candidate (B,), whether the answer named exactly one candidate (B,) bool.

        An invalid answer has choice 0 and scores 0; only ``generate`` can give one.
        """
        return self._rank(batch)

    def _rank(self, batch: RankBatch) -> tuple[Tensor, Tensor, Tensor]:
        with self._evaluating():
            if self.rank_mode in ("generate", "constrained"):
                choice, valid = self._answer(batch)
                scores = F.one_hot(choice, batch["candidates"].shape[1]).float() * valid.unsqueeze(1)
                return scores, choice, valid
            scores = self(batch)
            if self.hparams.subtract_prior and self.rank_mode == "score":
                scores = scores - self._priors(batch["candidates"])
            return scores, scores.argmax(1), torch.ones(len(scores), dtype=torch.bool, device=scores.device)

    def _priors(self, candidates: Tensor) -> Tensor:
        """(B, C) length-normalised likelihoods without a history, computed once per item until training goes on."""
        assert self.backbone is not None and self.catalogue is not None
        if self._prior is None:
            self._prior = torch.full((self.catalogue.num_items + 1,), float("nan"), device=self.device)
        missing = torch.unique(candidates[self._prior[candidates].isnan()])
        for items in missing.split(64):
            row = items.unsqueeze(0)
            prompts = self.prompts.build(row.new_zeros(1, 1), row[:, :0], row, with_history=False).to(self.device)
            # places of soft tokens keep the embedding of id 0 here: nobody is asked about, nothing is injected
            embeddings = self.backbone.embed(prompts.tokens)
            states = (tree_states if self._tree else separate_states)(self.backbone, embeddings, prompts)
            sums, counts = branch_log_likelihood(self.backbone, states, prompts)
            self._prior[items] = (sums / counts.clamp_min(1))[0]
        return self._prior[candidates]

    def _answer(self, batch: RankBatch) -> tuple[Tensor, Tensor]:
        """Choice (B,) and validity (B,) of the generated answers."""
        assert self.backbone is not None and self.catalogue is not None
        prompts = self._build(batch, branches=batch["target"].new_zeros(len(batch["target"]), 0))
        embeddings = self._embed(prompts, batch, self._affinities(batch))
        tokenizer = self.backbone.tokenizer
        candidates = batch["candidates"].cpu().numpy()
        tries = None
        if self.rank_mode == "constrained":
            tries = [TitleTrie(answers) for answers in self.prompts.answers(candidates)]
        length = self.hparams.title_tokens + 4
        answers = greedy(self.backbone, embeddings, prompts, length, tokenizer.eos_token_id, tries)
        if tries is not None:
            picked: list[int | None] = [trie.candidate(answer) for trie, answer in zip(tries, answers, strict=True)]
        else:
            titles = self.prompts.spoken_titles
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            picked = [
                TitleParser([titles[item] for item in row]).parse(text)
                for row, text in zip(candidates, texts, strict=True)
            ]
        valid = torch.tensor([index is not None for index in picked], device=self.device)
        return torch.tensor([index or 0 for index in picked], device=self.device), valid

    # ------------------------------------------------------------------------------------------------ Lightning

    def train(self, mode: bool = True) -> "LLMHead":
        """As ever; entering training forgets the cached title priors."""
        if mode:
            self._prior = None
        return super().train(mode)

    def training_step(self, batch: RankBatch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["target"]))
        if self.residual_weights is not None:
            self.log("train/residual", self.residual_weights[0], batch_size=len(batch["target"]))
        return loss

    def _evaluate(self, stage: str, batch: RankBatch) -> None:
        scores, _, _ = self._rank(batch)
        metrics: Any = self.metrics[stage]
        metrics.update(candidate_ranks(scores, batch["target_index"]))  # an invalid answer has equal scores: a miss
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(scores))

    def validation_step(self, batch: RankBatch, batch_idx: int) -> None:
        """Log ``val/hit@1``, ``val/ndcg@10`` and the like over the candidates."""
        self._evaluate("val", batch)

    def test_step(self, batch: RankBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: RankBatch, batch_idx: int) -> Tensor:
        """Scores (B, C)."""
        return self.rank(batch)

    def configure_optimizers(self) -> Any:
        """AdamW; one group each for adapters, projectors, head with residual; linear warm-up and decay."""
        hp = self.hparams
        groups: dict[str, tuple[Callable[[str], bool], float, float]] = {
            "adapters": (lambda n: n.startswith("backbone."), hp.adapter_learning_rate, hp.weight_decay),
            "projectors": (lambda n: n.startswith("projector."), hp.projector_learning_rate, hp.weight_decay),
            "head": (lambda n: n.startswith(("head.", "residual_")), hp.head_learning_rate, 0.0),
        }
        return adamw_with_warmup(self, groups, hp.warmup)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trainable parameters only: adapters, projectors, head, residual."""
        full = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        trained = {prefix + name for name, p in self.named_parameters() if p.requires_grad}
        for key in [k for k in full if k.startswith(prefix + "backbone.") and k not in trained]:
            del full[key]
        return full

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load trainable parameters; names and shapes must match.

        Raises:
            CheckpointError: naming the first key that is missing, unknown or of another shape.
        """
        own = self.state_dict()
        for key in sorted(own.keys() ^ state_dict.keys()):
            fault = "lacks" if key in own else "holds the unknown"
            raise CheckpointError(f"the checkpoint {fault} parameter '{key}'; it belongs to a head of other settings")
        for key, value in own.items():
            if value.shape != state_dict[key].shape:
                shapes = f"{tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
                raise CheckpointError(f"parameter '{key}' of the checkpoint has shape {shapes}")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _Loaded([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which base model and which shape of stage 1 the parameters belong to."""
        assert self.backbone is not None
        hidden_dim, names = self._shape or (0, ())
        checkpoint["sfubm_llm"] = {
            "base": self.backbone.fingerprint(),
            "hidden_dim": hidden_dim,
            "affinity_names": list(names),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild what the parameters belong to and refuse another base model.

        Raises:
            CheckpointError: if the checkpoint is not one of an LLM head, or was trained on another base model.
        """
        note = checkpoint.get("sfubm_llm")
        if note is None:
            raise CheckpointError("this is not a checkpoint of an LLM head (it has no entry 'sfubm_llm')")
        self.configure_model()
        assert self.backbone is not None
        if note["base"] != self.backbone.fingerprint():
            raise CheckpointError(
                f"the checkpoint was trained on another base model than '{self.hparams.llm}'; name that one as llm"
            )
        shape = (int(note["hidden_dim"]), tuple(note["affinity_names"]))
        if self._shape is not None and self._shape != shape:
            raise CheckpointError(
                f"the checkpoint expects a stage 1 of (hidden_dim, affinities) {shape}, not {self._shape}"
            )
        self._build_trainables(*shape)

    def export_adapter(self, folder: str | Path) -> None:
        """Write the LoRA adapters as a PEFT folder (projectors, head and residual stay in the checkpoint).

        Raises:
            ConfigError: if the LLM is frozen.
        """
        if self.backbone is None or not hasattr(self.backbone.model, "peft_config"):
            raise ConfigError("there are no adapters to export: tuning is 'frozen' or the model is not loaded yet")
        self.backbone.model.save_pretrained(str(folder))
