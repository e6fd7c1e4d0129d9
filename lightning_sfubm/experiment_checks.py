"""What an experiment refuses before anything is trained: rows and settings that could not come out as they were asked for."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_sfubm.datamodules.prompt_templates import load_template
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.methods import METHODS
from lightning_sfubm.methods.llm import ANSWERS
from lightning_sfubm.methods.published_llm import PUBLISHED_LLM, set_otherwise
from lightning_sfubm.modules.baselines.published_head import SHARED, PublishedHead
from lightning_sfubm.modules.llm.opening import check_model
from lightning_sfubm.modules.llm_head import LLMHead


def check_names(
    methods: Collection[str],
    llm: LLMHead | None,
    baselines: Mapping[str, LightningModule],
    patience: Mapping[str, int],
) -> None:
    """Refuse names that mean nothing, rows without the LLM they need, and modules that no row would train.

    Args:
        methods: rows asked for.
        llm: configured head.
        baselines: modules by row.
        patience: epochs by training.

    Raises:
        ConfigError: naming the row or the setting.
    """
    if unknown := [key for key in methods if key not in METHODS]:
        raise ConfigError(f"experiment.methods names {unknown}; known methods are {', '.join(METHODS)}")
    if llm is None and (needing := [key for key in methods if METHODS[key].needs_llm]):
        raise ConfigError(f"experiment.llm is needed for {', '.join(needing)}: configure it or leave these rows out")
    rows = [key for key, method in METHODS.items() if method.configurable]
    for key, module in baselines.items():
        if key not in rows:
            raise ConfigError(f"experiment.baselines names '{key}'; rows that take a module are {', '.join(rows)}")
        for name, value in METHODS[key].promises.items():
            if (found := getattr(module, name, value)) != value:
                raise ConfigError(
                    f"experiment.baselines.{key} has {name} '{found}', but row '{key}' is called '{METHODS[key].label}': set "
                    f"it to '{value}', or configure another row"
                )
        expected, encoder = METHODS[key].encoder, type(getattr(module, "encoder", module))
        # A subclass with a forward pass of its own may be any other model.
        if expected and not (issubclass(encoder, expected) and encoder.forward is expected.forward):
            raise ConfigError(
                f"experiment.baselines.{key} has an encoder {encoder.__name__}, but row '{key}' is called "
                f"'{METHODS[key].label}': make it a {expected.__name__}, or configure another row"
            )
    trainings = sorted({name for method in METHODS.values() for name in method.trainings})
    if unknown := [name for name in patience if name not in trainings]:
        raise ConfigError(f"experiment.patience names {unknown}; trainings with a patience are {', '.join(trainings)}")


def check_sizes(sizes: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers below the fewest that make sense.

    Args:
        sizes: value and least value by setting.

    Raises:
        ConfigError: naming the setting.
    """
    for name, (value, fewest) in sizes.items():
        if not fewest <= value < math.inf:
            raise ConfigError(f"experiment.{name} must be {fewest} or more, got {value}")


def check_heads(
    methods: Collection[str], llm: LLMHead | None, baselines: Mapping[str, LightningModule], text_samples: int
) -> None:
    """Refuse an LLM that rows cannot be derived from or would belie, and settings of heads that no row would read.

    Args:
        methods: rows asked for.
        llm: configured head.
        baselines: modules by row.
        text_samples: samples of text alone to start from.

    Raises:
        ConfigError: naming the setting.
    """
    if isinstance(llm, PublishedHead):
        rows = ", ".join(key for key, method in PUBLISHED_LLM.items() if method.configurable)
        raise ConfigError(
            f"experiment.llm is {type(llm).__name__}, which fixes what other rows set: give it as "
            f"lightning_sfubm.modules.llm_head.LLMHead, name the row you want ({rows}) in experiment.methods, and put settings "
            "of that row alone under experiment.baselines"
        )
    if llm is not None and text_samples and not (llm.rank_mode == "head" and llm.settings.tuning == "lora"):
        raise ConfigError(
            "experiment.text_samples gives adapters and head a start, which experiment.llm does not have: set it to 0, or "
            "form to branch, rank_mode to head and tuning to lora"
        )
    if llm is not None:
        _check_against_rows(methods, llm)
    for name, head in {"llm": llm, **{f"baselines.{key}": module for key, module in baselines.items()}}.items():
        if getattr(head, "hparams", {}).get("stage1_checkpoint"):
            raise ConfigError(
                f"experiment.{name}.stage1_checkpoint would be read by no row: the rows of a run stand on the stage 1 or "
                "recommender that it trains. Leave it out; --ckpt_path last goes on from trained rounds"
            )


def _check_against_rows(methods: Collection[str], llm: LLMHead) -> None:
    """Refuse a head whose settings would make a row another thing than it is called, or fail once stage 1 is trained."""
    for name in ("count_affinities", "residual_products"):
        if getattr(llm.settings, name):
            raise ConfigError(
                f"experiment.llm.{name} is set by the rows that have it: leave it out and name sfubm_counts or sfubm_products "
                "in experiment.methods"
            )
    has_residual = llm.rank_mode == "head" and llm.settings.residual
    if not has_residual and (of_residual := [key for key in ("sfubm_counts", "sfubm_products") if key in methods]):
        raise ConfigError(
            f"row '{of_residual[0]}' is '{METHODS[of_residual[0]].label}', and experiment.llm has no residual: set residual to "
            "true, form to branch and rank_mode to head, or leave the row out"
        )
    if "text_lora" in methods and llm.settings.tuning != "lora":
        raise ConfigError(
            f"row 'text_lora' is '{METHODS['text_lora'].label}', and experiment.llm has tuning '{llm.settings.tuning}': set it "
            "to lora, or leave the row out"
        )


def check_templates(
    methods: Collection[str], llm: LLMHead | None, templates: Mapping[str, str], domains: Collection[str]
) -> None:
    """Read every prompt template now, not after stage 1 has been trained.

    Args:
        methods: rows asked for.
        llm: configured head.
        templates: by domain.
        domains: names of the domains.

    Raises:
        ConfigError: one cannot be read, or is for a domain that there is not.
    """
    if unknown := sorted(templates.keys() - set(domains)):
        raise ConfigError(
            f"experiment.templates names {unknown}; the domains are {', '.join(sorted(domains))}: correct it, or leave it out"
        )
    if llm is not None and any(METHODS[key].needs_llm for key in methods):
        forms = {"branch", llm.hparams["form"]} | {"list" for key in methods if key in PUBLISHED_LLM or key in ANSWERS}
        for template in sorted({llm.hparams["template"], *templates.values()}):
            for form in sorted(forms):
                load_template(template, form)


def check_models(methods: Collection[str], llm: LLMHead | None, baselines: Mapping[str, LightningModule]) -> None:
    """Open every language model now, not after stage 1 has been trained; weights are not read.

    Args:
        methods: rows asked for.
        llm: configured head.
        baselines: modules by row.

    Raises:
        ConfigError: one is not there, or has no such layers, adapters or number format.
    """
    if llm is None or not any(METHODS[key].needs_llm for key in methods):
        return
    heads = [dict(llm.hparams)]
    for key in methods:
        if isinstance(head := baselines.get(key), PublishedHead):
            shared = {name: heads[0][name] for name in SHARED if name in heads[0]}
            heads.append({**vars(head.settings), **shared, **set_otherwise(head)})
    for settings in heads:
        rank = settings["adapter_rank"] if settings["tuning"] == "lora" else 0
        check_model(settings["llm"], settings["num_layers"], settings["precision"], rank, settings["adapter_targets"])


def check_needs(methods: Collection[str], model: LightningModule, domains: Mapping[str, Any]) -> None:
    """Refuse rows of a branch that stage 1 does not have, or of held-out positions there are none of.

    Args:
        methods: rows asked for.
        model: stage 1.
        domains: set-up datamodules by domain.

    Raises:
        ConfigError: naming row and branch, or row and domain.
    """
    bare = [name for name, domain in domains.items() if not len(domain.splits.stage2)]
    for key in methods:
        if bare and METHODS[key].fitted:
            raise ConfigError(
                f"row '{key}' is fitted on positions held out from stage 1, and domain '{bare[0]}' has none: set "
                "its stage2_positions to 1 or more (users of five interactions or more have them), or leave the row out"
            )
        if (needed := METHODS[key].branch) and needed not in getattr(model, "side_branches", ()):
            raise ConfigError(
                f"row '{key}' needs the {needed} of stage 1, which {type(model).__name__} does not have: leave it out"
            )
