"""A-LLMRec, stage 2: user state and joint item latents as soft tokens of a frozen LLM."""

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.published_head import PublishedHead


class ALLMRec(PublishedHead):
    """A frozen LLM that is told of user and items by two trained projectors, and nothing else (arXiv 2404.11343).

    The user's state opens the prompt; each title, in the history and among the candidates, is followed by its item's
    latent from :class:`~lightning_sfubm.modules.baselines.a_llmrec_alignment.ALLMRecAlignment`. The candidates stand in
    the prompt and the answer is a title. Only the projectors are trained, on the answer's tokens.

    Args:
        llm: as for :class:`~lightning_sfubm.modules.llm_head.LLMHead`, like all that is not described here.
        num_layers: ``None`` keeps all; the vocabulary head reads the last one.
        template: see there; ``None`` = ``shopping``, or in a table that of its LLM.
        rank_mode: ``generate`` (the published way), ``constrained`` or ``score``.
        latents: ``items``, from the recommender's embeddings (the published way), or ``texts``, from the text vectors
            (for items that the recommender does not know).
        history_length: published value 10.
        title_tokens: see there.
        projector_learning_rate: see there.
        weight_decay: see there.
        warmup: see there.
        precision: see there.
        activation_checkpointing: see there.
        seed: see there.

    Raises:
        ConfigError: an unknown kind of latents.

    Example:
        >>> head = ALLMRec.from_head(llm_head.hparams)
        >>> head.attach_stage1(alignment, catalogue)            # a trained ALLMRecAlignment
    """

    reads_stage1 = True

    def __init__(
        self,
        llm: str = "smollm2-135m",
        num_layers: int | None = None,
        template: str | None = None,
        rank_mode: str = "generate",
        latents: str = "items",
        history_length: int = 10,
        title_tokens: int = 12,
        projector_learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        if latents not in ("items", "texts"):
            raise ConfigError(f"latents '{latents}' is not one of items, texts")
        super().__init__(
            llm=llm,
            num_layers=num_layers,
            form="list",
            template=template,
            rank_mode=rank_mode,
            tuning="frozen",
            item_tokens=latents == "items",
            semantic_token=latents == "texts",
            residual=False,
            history_length=history_length,
            title_tokens=title_tokens,
            projector_learning_rate=projector_learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            precision=precision,
            activation_checkpointing=activation_checkpointing,
            seed=seed,
        )
