"""LLaRA: titles and projected ID embeddings side by side in the prompt, introduced by a curriculum."""

from lightning_sfubm.modules.baselines.published_head import PublishedHead


class LLaRA(PublishedHead):
    """Hybrid prompts: every title is followed by the projected, static ID embedding of its item (arXiv 2312.02445).

    The candidates stand in the prompt and the answer is a title. A projector carries the ID embeddings of a trained,
    frozen sequential recommender into the LLM's token space; no user state and no text vector is injected. The LLM is
    tuned by LoRA on the answer's tokens. The chance that a batch shows the soft tokens rises linearly from 0 to 1 over
    ``curriculum`` of the training steps.

    Args:
        llm: as for :class:`~lightning_sfubm.modules.llm_head.LLMHead`, like all that is not described here.
        num_layers: ``None`` keeps all; the vocabulary head reads the last one.
        template: see there; ``None`` = ``shopping``, or in a table that of its LLM.
        rank_mode: ``generate`` (the published way), ``constrained`` or ``score``.
        adapter_rank: published value 8.
        adapter_alpha: published value 32.
        adapter_dropout: published value .1.
        adapter_targets: published: all linear layers.
        history_length: see there.
        title_tokens: see there.
        curriculum: share of the training steps over which the soft tokens come in; published: all of them.
        adapter_learning_rate: see there.
        projector_learning_rate: see there.
        weight_decay: see there.
        warmup: published value .05.
        stage1_checkpoint: checkpoint of the recommender, where none is attached.
        precision: see there.
        activation_checkpointing: see there.
        seed: see there.

    Example:
        >>> head = LLaRA.from_head(llm_head.hparams)
        >>> head.attach_stage1(recommender, catalogue)          # a trained SequentialRecommender(SASRec(...))
    """

    reads_stage1 = True

    def __init__(
        self,
        llm: str = "smollm2-135m",
        num_layers: int | None = None,
        template: str | None = None,
        rank_mode: str = "generate",
        adapter_rank: int = 8,
        adapter_alpha: int = 32,
        adapter_dropout: float = 0.1,
        adapter_targets: str = "all-linear",
        history_length: int = 10,
        title_tokens: int = 12,
        curriculum: float = 1.0,
        adapter_learning_rate: float = 3e-4,
        projector_learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        stage1_checkpoint: str | None = None,
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
            semantic_token=False,
            residual=False,
            history_length=history_length,
            title_tokens=title_tokens,
            curriculum=curriculum,
            adapter_learning_rate=adapter_learning_rate,
            projector_learning_rate=projector_learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            stage1_checkpoint=stage1_checkpoint,
            precision=precision,
            activation_checkpointing=activation_checkpointing,
            seed=seed,
        )
