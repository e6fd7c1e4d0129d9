"""Settings of LLM rows: what a row was configured with is what it runs with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_sfubm.methods import METHODS, llm
from lightning_sfubm.methods.published_llm import _answering, _head
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


@pytest.mark.parametrize(("form", "data"), [("branch", "sampled"), ("list", "all of them")])
def test_a_prompt_that_lists_the_candidates_lists_as_many_in_training(
    form: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    trainer = SimpleNamespace(
        fit=lambda head, datamodule: given.append(datamodule), save_checkpoint=lambda *args, **kwargs: None
    )
    run = run_of(LLMHead("no-model", form=form, residual=False), llm_epochs=1)
    run.trainer.make_trainer, run.folder, run.run_dir = lambda **kwargs: trainer, lambda key: Path(key), Path("run")
    run.ranking_data, run.list_data = "sampled", "all of them"
    monkeypatch.setattr(LLMHead, "attach_stage1", lambda self, stage1, catalogue: None)
    METHODS["text_lora"].build(run)
    assert given == [data]


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


@pytest.mark.parametrize("order", [("llara", "llara_likelihood"), ("llara_likelihood", "llara"), ("llara_likelihood",)])
def test_two_rows_of_a_method_share_one_tuned_head(order: tuple[str, ...]) -> None:
    tuned: list[Any] = []

    def build(run: Any) -> Any:
        tuned.append(LLaRA("no-model"))
        return tuned[-1]

    run = run_of(LLMHead("no-model"), methods=list(order))
    run.shared = {}
    for key in order:
        row: Any = _answering("llara", build, by_likelihood=key != "llara")(run)
        assert row.rank_mode == ("generate" if key == "llara" else "score")
        assert row._parameters is tuned[0]._parameters
    assert len(tuned) == 1
    assert not run.shared  # nothing of it stays in memory once both rows are there
