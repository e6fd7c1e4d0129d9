"""Settings of LLM rows: what a row was configured with is what it runs with."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_sfubm.methods import METHODS, llm
from lightning_sfubm.methods.published_llm import _head
from lightning_sfubm.modules.baselines.a_llmrec import ALLMRec
from lightning_sfubm.modules.baselines.llara import LLaRA
from lightning_sfubm.modules.baselines.tallrec import TALLRec
from lightning_sfubm.modules.llm_head import LLMHead


def run_of(head: LLMHead, **experiment: Any) -> Any:
    settings = {"baselines": {}, "templates": {}, "align_epochs": 0, **experiment}
    return SimpleNamespace(
        name="alpha",
        trainer=SimpleNamespace(seed=3),
        experiment=SimpleNamespace(llm=head, **settings),
        stage1=None,
        data=SimpleNamespace(catalogue=None),
    )


@pytest.mark.parametrize(("key", "kind"), [("tallrec", TALLRec), ("llara", LLaRA), ("a_llmrec", ALLMRec)])
def test_template_of_the_domain_then_of_the_baseline_then_of_the_llm(key: str, kind: Any) -> None:
    shared = LLMHead("no-model", template="movies")

    def template(baseline: Any = None, **templates: str) -> str:
        baselines = {} if baseline is None else {key: baseline}
        return _head(run_of(shared, baselines=baselines, templates=templates), key, kind).settings.template

    assert template() == "movies"
    assert template(kind("no-model")) == "movies"
    assert template(kind("no-model", template="shopping")) == "shopping"
    assert template(kind("no-model", template="books")) == "books"
    assert template(kind("no-model", template="books"), beta="food") == "books"
    assert template(kind("no-model", template="books"), alpha="food") == "food"
    assert kind("no-model").settings.template == "shopping"


@pytest.mark.parametrize("aligned", [None, "aligned.ckpt"])
def test_configured_projectors_stay_where_none_are_aligned(
    aligned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "tune", lambda run, head, key: head)
    monkeypatch.setattr(LLMHead, "attach_stage1", lambda self, stage1, catalogue: None)
    if aligned:
        monkeypatch.setattr(llm, "_align", lambda run: aligned)
    row: Any = METHODS["sfubm"].build(run_of(LLMHead("no-model", projector_checkpoint="configured.ckpt")))
    assert row.settings.projector_checkpoint == (aligned or "configured.ckpt")
