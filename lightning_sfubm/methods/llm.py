"""Rows of the LLM stage. They are derived from one configured head, so that backbone, prompt and budget are shared."""

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import Tensor

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.datamodules.item_datamodule import ItemDataModule
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.methods.answers import answering
from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.modules.baselines.late_fusion import LateFusion
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.prompt_projector import PromptProjector
from lightning_sfubm.ranks import is_first
from lightning_sfubm.safe_load import load_checkpoint
from lightning_sfubm.seeds import derive_seed

BOTH = "{model}, both stages"  #: heading of the rows that are the whole method


def _head(run: DomainRun, **changes: Any) -> LLMHead:
    template = run.experiment.llm
    assert template is not None
    names = inspect.signature(type(template).__init__).parameters
    settings = {k: v for k, v in template.hparams.items() if k in names}
    settings["template"] = run.experiment.templates.get(run.name, settings["template"])
    settings["seed"] = run.trainer.seed
    return type(template)(**{**settings, **changes})


def _trainer(run: DomainRun, key: str, epochs: int) -> Trainer:
    return run.trainer.make_trainer(
        label=f"{key}, {run.name}",
        max_epochs=epochs,
        folder=run.folder(key),
        client=f"{run.name}-{key}",
        precision="32-true",  # the head sets its own
        gradient_clip_val=1.0,
        limit_val_batches=0,
    )


def tune(run: DomainRun, head: LLMHead, key: str) -> LLMHead:
    """Tune a head on the domain's stage-2 samples and store it; or read it again where an earlier process has, on these items.

    Where the candidates stand in the prompt, a sample has as many in training as in ranking.

    Args:
        run: the domain.
        head: with stage 1 attached.
        key: of the row.
    """
    path = run.run_dir / "models" / run.name / f"{key}.ckpt"
    if key in run.tuned and path.is_file():  # a folder, where the model is divided among processes
        stored = load_checkpoint(path)
        # What a published head reads of a recommender is trained again, and on another machine ends elsewhere.
        if stored.get("sfubm_llm", {}).get("item_tables") == head.item_tables_digest():
            head.on_load_checkpoint(stored)
            head.load_state_dict(stored["state_dict"])
            return head
    torch.manual_seed(derive_seed(run.trainer.seed, "llm", key, run.name))
    trainer = _trainer(run, key, run.experiment.llm_epochs)
    trainer.fit(head, datamodule=run.list_data if head.settings.form == "list" else run.ranking_data)
    if head.residual_weights is not None and run.experiment.calibration_users:
        # Not the datamodule's loader, which deals the users out to the processes of a distributed run.
        users = run.data.rank_dataloader(
            "val", run.experiment.llm_eval_batch_size, max_users=run.experiment.calibration_users, seed=run.data.seed
        )
        head.to(run.trainer.strategy.root_device)  # a trainer leaves its module on the CPU
        factor = head.calibrate(users)
        Console(highlight=False, quiet=not is_first()).print(
            f"  what the LLM adds, weighed on validation users: times {factor:.2f}"
        )
    trainer.save_checkpoint(path, weights_only=True)
    return head


def _zero_shot(subtract_prior: bool) -> Callable[[DomainRun], Ranker]:
    def build(run: DomainRun) -> Ranker:
        # All layers: the vocabulary head reads the last one, so a model cut short has no title likelihood to speak of.
        untuned = {"rank_mode": "score", "subtract_prior": subtract_prior, "tuning": "frozen", "residual": False}
        untuned["num_layers"] = None
        head = _head(run, form="branch", **untuned)
        head.attach_stage1(None, run.data.catalogue)
        return head

    return build


def _text_head(run: DomainRun) -> LLMHead:
    head = _head(run, user_token=False, item_tokens=False, semantic_token=False, affinity_token=False, residual=False)
    head.attach_stage1(None, run.data.catalogue)
    return head


def _text_start(run: DomainRun, head: LLMHead) -> bool:
    """Give a head the adapters and the output that come from tuning on text alone; whether there are any.

    They are tuned on positions that stage 1 was trained on, of which there are many more than held-out ones: a prompt
    without soft tokens and residual reads nothing of stage 1, so it does not matter that stage 1 knows the answers.
    """
    count = run.experiment.text_samples
    if not count or head.settings.tuning != "lora" or head.head is None:
        return False

    def build() -> dict[str, Tensor]:
        text = _text_head(run)
        data = RankingDataModule(
            run.data,
            batch_size=run.experiment.llm_batch_size,
            train_candidates=run.experiment.train_candidates,
            seed=run.data.seed,
            text_samples=count,
        )
        torch.manual_seed(derive_seed(run.trainer.seed, "llm", "text start", run.name))
        _trainer(run, "text_start", epochs=1).fit(text, datamodule=data)
        return {name: p.detach().cpu().clone() for name, p in text.named_parameters() if p.requires_grad}

    head.start_from(run.once(f"text start {run.name}", "text_start", build))
    return True


def _text_lora(run: DomainRun) -> Ranker:
    head = _text_head(run)
    _text_start(run, head)
    return tune(run, head, "text_lora")


def _align(run: DomainRun) -> str | None:
    """Train the projectors alone (title alignment); returns their checkpoint, ``None`` where no epochs are asked for."""
    template, epochs = run.experiment.llm, run.experiment.align_epochs
    if not epochs:
        return None
    assert template is not None
    names = {name: template.hparams[name] for name in ("llm", "title_tokens")}
    projector = PromptProjector(**names, seed=run.trainer.seed)
    projector.attach_stage1(run.stage1, run.data.catalogue)
    trainer = run.trainer.make_trainer(
        label=f"alignment, {run.name}", max_epochs=epochs, folder=run.folder("projector")
    )
    trainer.fit(projector, datamodule=ItemDataModule(run.data, seed=run.trainer.seed))
    path = run.run_dir / "models" / run.name / "projector.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    return str(path)


def _sfubm(
    key: str = "sfubm", fusion: Callable[[DomainRun], LateFusion] = attrgetter("fusion"), **changes: Any
) -> Callable[[DomainRun], LLMHead]:
    """Both stages, or a form of the second: the head with some settings changed, its residual that of a fusion."""

    def build(run: DomainRun) -> LLMHead:
        aligned = _align(run)  # without, the head keeps the projectors it was configured with
        head = _head(run, **({} if aligned is None else {"projector_checkpoint": aligned}), **changes)
        head.attach_stage1(run.stage1, run.data.catalogue)
        has_start = _text_start(run, head)
        if head.residual_weights is not None:
            head.init_residual(fusion(run).weights)
            if has_start:  # a score that was to rank alone is to add to one that does: weighed where both are unseen
                head.to(run.trainer.strategy.root_device)
                head.calibrate(run.ranking_data.held_out_dataloader(run.experiment.llm_eval_batch_size))
        return tune(run, head, key)

    return build


def _form(
    key: str,
    label: str,
    fusion: Callable[[DomainRun], LateFusion] = attrgetter("fusion"),
    group: str = "Ablations of stage 2",
    **changes: Any,
) -> Method:
    """Both stages with another residual, or with a part of the second left out."""
    return Method(
        f"{{model}}, {label}", group, _sfubm(key, fusion, **changes), needs_llm=True, needs_stage1=True, fitted=True
    )


#: The second stage in words: candidates stand in the prompt, the answer is a title. All layers, as it is the vocabulary
#: head that writes; nothing of stage 1 is added to what it says. By row: how titles are ranked, and its label.
ANSWERS = {
    "sfubm_list": ("generate", "candidates in the prompt, free answer"),
    "sfubm_list_constrained": ("constrained", "candidates in the prompt, answer among them"),
    "sfubm_list_likelihood": ("score", "candidates in the prompt, by title likelihood"),
}
_WRITTEN = answering(
    "sfubm_list",
    _sfubm("sfubm_list", form="list", rank_mode="generate", subtract_prior=False, residual=False, num_layers=None),
    {key: mode for key, (mode, _) in ANSWERS.items()},
)

LLM: dict[str, Method] = {
    "zero_shot": Method("Zero-shot LLM", "LLM", _zero_shot(False), needs_llm=True),
    "zero_shot_prior": Method("Zero-shot LLM, less the title's prior", "LLM", _zero_shot(True), needs_llm=True),
    "text_lora": Method("Text-only LoRA", "LLM", _text_lora, needs_llm=True, fitted=True),
    "sfubm": Method("{model}", BOTH, _sfubm(), needs_llm=True, needs_stage1=True, fitted=True),
    "sfubm_counts": _form(
        "sfubm_counts", "counts in its residual", attrgetter("count_fusion"), BOTH, count_affinities=True
    ),
    "sfubm_products": _form(
        "sfubm_products",
        "counts and products in its residual",
        attrgetter("product_fusion"),
        BOTH,
        count_affinities=True,
        residual_products=True,
    ),
    "sfubm_no_user_token": _form("sfubm_no_user_token", "no user token", user_token=False),
    "sfubm_no_item_tokens": _form("sfubm_no_item_tokens", "no ID embeddings", item_tokens=False),
    "sfubm_no_semantic_token": _form("sfubm_no_semantic_token", "no semantic embeddings", semantic_token=False),
    "sfubm_affinity_token": _form("sfubm_affinity_token", "affinities as tokens", affinity_token=True),
    "sfubm_no_residual": _form("sfubm_no_residual", "no stage-1 score", residual=False),
    "sfubm_frozen": _form("sfubm_frozen", "LLM frozen", tuning="frozen"),
    **{
        key: Method(f"{{model}}, {label}", BOTH, _WRITTEN[key], needs_llm=True, needs_stage1=True, fitted=True)
        for key, (_, label) in ANSWERS.items()
    },
}
