"""A causal LM with soft tokens from a frozen stage 1: assembly, injection, checkpoints. No task of its own."""

import hashlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch, Stage1
from lightning_sfubm.datamodules.prompt_batch import CANDIDATE, USER, PromptBatch
from lightning_sfubm.datamodules.prompt_templates import PromptTemplate
from lightning_sfubm.datamodules.prompts import PromptBuilder
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.layers.affinity import standardise
from lightning_sfubm.modules.layers.count_affinity import WithCounts
from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.list_ranking import supports_cache
from lightning_sfubm.modules.llm.projection import TokenProjector
from lightning_sfubm.modules.llm.sharding import is_sharded, shard
from lightning_sfubm.modules.llm.splice import splice
from lightning_sfubm.modules.llm.stage1 import check_same_catalogue, load_stage1
from lightning_sfubm.modules.llm.tree import separate_states, supports_tree, tree_states
from lightning_sfubm.safe_load import load_checkpoint
from lightning_sfubm.seeds import seeded


class _Loaded(NamedTuple):
    """What an incompatible-keys answer looks like when all keys fit."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class InjectedLM(L.LightningModule):
    """Base of :class:`~lightning_sfubm.modules.llm_head.LLMHead`: everything but output, loss and ranking.

    Settings are read from ``self.hparams`` (described at the head). A sub-class builds its own trainable parts in
    :meth:`build_output`. Checkpoints hold the trainable parameters only.

    Args:
        template: texts of the prompt form.
    """

    id_table: Tensor
    semantic_table: Tensor

    def __init__(self, template: PromptTemplate) -> None:
        super().__init__()
        self.template = template
        self.backbone: Backbone | None = None
        self.projector: TokenProjector | None = None
        self.catalogue: Catalogue | None = None
        self._stage1: list[Any] = []  # a list keeps the module out of our parameters, checkpoints and modes
        self._shape: tuple[int, tuple[str, ...]] | None = None  # H and the affinity names of stage 1
        self._tree = True

    @property
    def settings(self) -> Any:
        """The hyper-parameters, as an object with one attribute each."""
        return self.hparams

    @property
    def lm(self) -> Backbone:
        """The language model.

        Raises:
            ConfigError: before it has been loaded.
        """
        if self.backbone is None:
            raise ConfigError("the LLM is not loaded yet; call attach_stage1(stage1 or None, catalogue)")
        return self.backbone

    def build_output(self, num_affinities: int) -> None:
        """Create the trainable output parts for F affinities (0: no stage 1). Called once."""

    # ------------------------------------------------------------------------------------------------ assembly

    def configure_model(self) -> None:
        """Load the base model (once). Called by Lightning, by :meth:`attach_stage1` and on loading a checkpoint.

        Under ``ModelParallelStrategy`` the parameters are divided among the processes, once all of them are there.

        Raises:
            ConfigError: the strategy divides the model in a way this head does not know.
        """
        if self._trainer is not None and isinstance(self._trainer.strategy, FSDPStrategy):
            raise ConfigError(
                "trainer.strategy: an LLM head is divided among processes by FSDP2, not by FSDPStrategy: use "
                "configs/trainer/sharded.yaml"
            )
        if self.backbone is None:
            self._load_base()
        if self._shape is not None and self.device_mesh is not None and not is_sharded(self):
            shard(self, self.lm, self.device_mesh["data_parallel"])

    def _load_base(self) -> None:
        hp = self.settings
        with seeded(hp.seed, "llm", "adapters"):
            self.backbone = Backbone(
                hp.llm,
                hp.num_layers,
                hp.precision,
                hp.adapter_rank if hp.tuning == "lora" else 0,
                hp.adapter_alpha,
                hp.adapter_dropout,
                hp.adapter_targets,
                hp.activation_checkpointing,
            )
        self._tree = supports_tree(self.backbone)
        if self.rank_mode in ("generate", "constrained") and not supports_cache(self.backbone):
            raise ConfigError(
                f"'{hp.llm}' ({self.backbone.config.model_type}) does not go on from keys and values of what it has read and "
                f"cannot be asked with rank_mode '{self.rank_mode}': use the list form's rank_mode score, or another LLM"
            )
        if self.rank_mode != "head" and (left_out := getattr(self.backbone.config, "layers_left_out", 0)):
            warnings.warn(
                f"rank_mode '{self.rank_mode}' reads what the LLM's vocabulary head says, which was trained on the last layer; "
                f"num_layers = {hp.num_layers} leaves out {left_out}: set num_layers to null",
                stacklevel=2,
            )

    def attach_stage1(self, stage1: Stage1 | None, catalogue: Catalogue) -> None:
        """Give the head its domain: the frozen stage 1 (``None`` for text-only methods) and the catalogue.

        Item tables are read here, once: attach again after stage 1 has changed.

        Raises:
            CheckpointError: if this head was loaded from a checkpoint that belongs to another stage 1.
            ConfigError: count affinities are asked for, but the catalogue has no training sequences.
        """
        self.configure_model()
        self.catalogue = catalogue
        if stage1 is not None and self.settings.count_affinities:
            stage1 = WithCounts(stage1, catalogue)
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
        if not self.training:
            self.eval()  # what was made here is in training mode, and adapters would drop inputs while the head ranks

    def _build_trainables(self, hidden_dim: int, affinity_names: tuple[str, ...], restored: bool = False) -> None:
        """Projectors and residual for a stage 1 of this shape (H = 0: none). Keeps those already there.

        Where they are ``restored``, a checkpoint holds their values, aligned projectors among them.
        """
        if self._shape is not None:
            return
        hp = self.settings
        self._shape = (hidden_dim, affinity_names)
        self.build_output(len(affinity_names))
        if hidden_dim == 0:
            return
        affinities = len(affinity_names) if hp.affinity_token else 0
        if hp.user_token or hp.item_tokens or hp.semantic_token or affinities:
            with seeded(hp.seed, "llm", "projectors"):
                self.projector = TokenProjector(
                    hidden_dim,
                    self.lm.embedding_dim,
                    self.lm.token_norm,
                    hp.user_token,
                    hp.item_tokens,
                    hp.semantic_token,
                    affinities,
                ).to(self.device)
            if hp.projector_checkpoint and not restored:
                self._load_projector(hp.projector_checkpoint)

    def _load_projector(self, path: str) -> None:
        assert self.projector is not None
        try:
            state = load_checkpoint(path)["state_dict"]
            own = self.projector.state_dict()
            aligned = {k.removeprefix("tokens."): v for k, v in state.items() if k.startswith("tokens.")}
            lacking = sorted(k for k in own.keys() - aligned.keys() if not k.startswith("affinity_map."))
            if lacking:
                raise KeyError(f"it has no parameter '{lacking[0]}'")
            self.projector.load_state_dict({**own, **{k: v for k, v in aligned.items() if k in own}})
        except (CheckpointError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"projector checkpoint {path} does not fit this head: {reason}") from error

    def _build_prompts(self) -> None:
        hp = self.settings
        assert self.catalogue is not None
        soft = self.projector is not None
        in_items = soft and (hp.item_tokens or hp.semantic_token)
        titles = self.catalogue.titles
        shared = (self.lm.tokenizer, self.template, titles, hp.history_length, hp.title_tokens)
        self.prompts = PromptBuilder(
            *shared, soft and hp.user_token, in_items, in_items or (soft and hp.affinity_token)
        )
        self.text_prompts = PromptBuilder(*shared, False, False, False) if soft else self.prompts
        self._fitted = (0, 0)

    def _fit_context(self, num_candidates: int, num_disliked: int = 0) -> None:
        """Shorten titles where the longest prompt with this many items would not fit the model, and say so."""
        most = (max(num_candidates, self._fitted[0]), max(num_disliked, self._fitted[1]))
        if most == self._fitted:
            return
        self._fitted = most
        context = getattr(self.lm.config, "max_position_embeddings", None)
        if context is None:
            return
        before = self.prompts.title_tokens
        both = list({id(p): p for p in (self.prompts, self.text_prompts)}.values())
        for prompts in both:
            prompts.fit_context(int(context), *most)
        for prompts in both:  # alike: a title's likelihood and its prior are of the same tokens
            prompts.limit_titles(min(p.title_tokens for p in both))
        if self.prompts.title_tokens < before:
            warnings.warn(
                f"prompts with {most[0]} candidates do not fit the model's {context} tokens: titles are cut to "
                f"{self.prompts.title_tokens} tokens instead of {before} ({self.prompts.cut_titles} of "
                f"{self.prompts.num_items} are longer)",
                stacklevel=2,
            )

    def setup(self, stage: str) -> None:
        """Take catalogue and stage 1 from the datamodule and ``stage1_checkpoint`` where nothing was attached.

        Raises:
            ConfigError: there is no catalogue, or the attached one is another domain's than the datamodule's.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.catalogue is not None:
            check_same_catalogue(self.catalogue, datamodule)
        else:
            catalogue = getattr(datamodule, "catalogue", None)
            if catalogue is None:
                raise ConfigError("the LLM head needs a datamodule with a catalogue, or attach_stage1() before the run")
            path = self.settings.stage1_checkpoint
            self.attach_stage1(load_stage1(path, catalogue) if path else None, catalogue)

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
        embeddings = self.lm.embed(prompts.tokens)
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

    def _states(self, prompts: PromptBatch, embeddings: Tensor) -> Tensor:
        """States (B, S, hidden_dim), the branches isolated from each other."""
        return (tree_states if self._tree else separate_states)(self.lm, embeddings, prompts)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
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
        hidden_dim, names = self._shape or (0, ())
        checkpoint["sfubm_llm"] = {
            "base": self.lm.fingerprint(),
            "weights": self.lm.weights_sample(),
            "hidden_dim": hidden_dim,
            "affinity_names": list(names),
            "item_tables": self.item_tables_digest(),
        }

    def item_tables_digest(self) -> str:
        """Hash of the attached stage 1's item tables, which the projectors were tuned on; ``""`` without a stage 1."""
        if not self._stage1:
            return ""
        digest = hashlib.sha256()
        for table in (self.id_table, self.semantic_table):
            digest.update(table.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild what the parameters belong to and refuse another base model.

        Raises:
            CheckpointError: if the checkpoint is not one of an LLM head, or was trained on another base model.
        """
        note = checkpoint.get("sfubm_llm")
        if note is None:
            raise CheckpointError("this is not a checkpoint of an LLM head (it has no entry 'sfubm_llm')")
        self.configure_model()
        # checkpoints of before, and those of a quantised base, have no sample of the weights
        samples = {note.get("weights"), self.lm.weights_sample()} - {None, ""}
        if note["base"] != self.lm.fingerprint() or len(samples) > 1:
            raise CheckpointError(
                f"the checkpoint was trained on another base model than '{self.settings.llm}'; name that one as llm"
            )
        shape = (int(note["hidden_dim"]), tuple(note["affinity_names"]))
        if self._shape is not None and self._shape != shape:
            raise CheckpointError(
                f"the checkpoint expects a stage 1 of (hidden_dim, affinities) {shape}, not {self._shape}"
            )
        self._build_trainables(*shape, restored=True)

    def export_adapter(self, folder: str | Path) -> None:
        """Write the LoRA adapters as a PEFT folder (projectors, head and residual stay in the checkpoint).

        Raises:
            ConfigError: if the LLM is frozen.
        """
        if self.backbone is None or not hasattr(self.backbone.model, "peft_config"):
            raise ConfigError("there are no adapters to export: tuning is 'frozen' or the model is not loaded yet")
        self.backbone.model.save_pretrained(str(folder))
