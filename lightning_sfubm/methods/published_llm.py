"""Rows of published LLM recommenders, on the backbone, samples and test users of the other LLM rows."""

import copy
import inspect
from collections.abc import Callable

import torch

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.methods.answers import answering
from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.methods.llm import tune
from lightning_sfubm.methods.single_domain import recommender_template
from lightning_sfubm.modules.baselines.a_llmrec import ALLMRec
from lightning_sfubm.modules.baselines.a_llmrec_alignment import ALLMRecAlignment
from lightning_sfubm.modules.baselines.llara import LLaRA
from lightning_sfubm.modules.baselines.published_head import PublishedHead
from lightning_sfubm.modules.baselines.tallrec import TALLRec
from lightning_sfubm.modules.llm.ranking import RankingLM
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import derive_seed, follow_seed

LIKELIHOOD = "_likelihood"  #: ending of the rows in which a head that answers in words ranks by their likelihood


def _head(run: DomainRun, key: str, kind: type[PublishedHead]) -> PublishedHead:
    """The method's head on the shared backbone, with what ``experiment.baselines`` sets otherwise than the method's defaults.

    A setting that is left at its default there is not one's own: backbone, prompt lengths and optimiser are those of
    ``experiment.llm``, so that the rows of a table share them. Its template is that of the domain
    (``experiment.templates``), else the one set for the baseline itself, else that of ``experiment.llm``.
    """
    assert run.experiment.llm is not None
    configured = run.experiment.baselines.get(key)
    if configured is not None and not isinstance(configured, kind):
        raise ConfigError(f"experiment.baselines.{key} must be a {kind.__name__}, not {type(configured).__name__}")
    shared = run.experiment.llm.hparams
    template = run.experiment.templates.get(run.name) or getattr(configured, "own_template", None) or shared["template"]
    own = {} if configured is None else set_otherwise(configured)
    cls = kind if configured is None else type(configured)
    return cls.from_head(shared, template=template, **{**own, "seed": run.trainer.seed})


def set_otherwise(head: PublishedHead) -> dict[str, object]:
    """Settings of a head that are not its class's defaults, but for the template.

    Args:
        head: as configured for a row.
    """
    given = vars(head.settings)
    offered = inspect.signature(type(head).__init__).parameters
    names = [name for name in offered if name in given and name != "template"]
    return {name: given[name] for name in names if given[name] != offered[name].default}


def _recommender(run: DomainRun) -> SequentialRecommender:
    """The sequential recommender that LLaRA and A-LLMRec build on, trained without the positions held out for the LLM."""

    def build() -> SequentialRecommender:
        torch.manual_seed(derive_seed(run.trainer.seed, "baseline", "recommender", run.name))
        module = recommender_template(run)
        follow_seed(module, run.trainer.seed)
        module.bind(run.data.catalogue)
        run.fit(module, "recommender", run.data)
        return module

    return run.once(f"recommender {run.name}", "recommender", build)


def _tallrec(run: DomainRun) -> RankingLM:
    head = _head(run, "tallrec", TALLRec)
    head.attach_stage1(None, run.data.catalogue)
    return tune(run, head, "tallrec")


def _llara(run: DomainRun) -> RankingLM:
    head = _head(run, "llara", LLaRA)
    head.attach_stage1(_recommender(run), run.data.catalogue)
    return tune(run, head, "llara")


def _a_llmrec(run: DomainRun) -> RankingLM:
    torch.manual_seed(derive_seed(run.trainer.seed, "baseline", "a_llmrec", run.name))
    alignment = ALLMRecAlignment(seed=run.trainer.seed)
    alignment.attach_recommender(copy.deepcopy(_recommender(run)), run.data.catalogue)
    run.fit(alignment, "a_llmrec_alignment", run.data)
    head = _head(run, "a_llmrec", ALLMRec)
    head.attach_stage1(alignment, run.data.catalogue)
    return tune(run, head, "a_llmrec")


def _rows(key: str, label: str, build: Callable[[DomainRun], RankingLM], *trainings: str) -> dict[str, Method]:
    group = "LLM, one domain"
    made = answering(key, build, {key: None, key + LIKELIHOOD: "score"})
    return {
        key: Method(
            label,
            group,
            made[key],
            needs_llm=True,
            configurable=True,
            trainings=trainings,
            fitted=True,
        ),
        key + LIKELIHOOD: Method(
            f"{label}, by title likelihood",
            group,
            made[key + LIKELIHOOD],
            needs_llm=True,
            trainings=trainings,
            fitted=True,
        ),
    }


PUBLISHED_LLM: dict[str, Method] = {
    **_rows("tallrec", "TALLRec", _tallrec),
    **_rows("llara", "LLaRA", _llara, "recommender"),
    **_rows("a_llmrec", "A-LLMRec", _a_llmrec, "recommender", "a_llmrec_alignment"),
}
