"""Settings of LLM rows: what a row was configured with is what it runs with."""

import inspect
import json
import shutil
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfubm.errors import ConfigError, SFUBMError
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.experiment import Experiment
from lightning_sfubm.experiment_checks import check_models
from lightning_sfubm.methods import METHODS, llm, published_llm
from lightning_sfubm.methods.answers import answering
from lightning_sfubm.methods.published_llm import _head
from lightning_sfubm.modules.baselines.a_llmrec import ALLMRec
from lightning_sfubm.modules.baselines.llara import LLaRA
from lightning_sfubm.modules.baselines.tallrec import TALLRec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from tests.conftest import quiet_trainer, small_distiller, small_federation


def run_of(head: LLMHead, **experiment: Any) -> Any:
    settings = {"baselines": {}, "templates": {}, "align_epochs": 0, "text_samples": 0, **experiment}
    return SimpleNamespace(
        name="alpha",
        trainer=SimpleNamespace(seed=3),
        experiment=SimpleNamespace(llm=head, **settings),
        stage1=None,
        data=SimpleNamespace(catalogue=None),
        tuned=set(),
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


@pytest.mark.parametrize(("key", "kind"), [("tallrec", TALLRec), ("llara", LLaRA), ("a_llmrec", ALLMRec)])
def test_a_baseline_that_sets_one_thing_keeps_the_backbone_and_the_budget_of_all_rows(key: str, kind: Any) -> None:
    """What is left at a method's default is not set: a row must not move to another LLM by one setting of its own."""
    shared = LLMHead(
        "the-llm", history_length=6, title_tokens=9, adapter_learning_rate=2e-3, projector_learning_rate=2e-3
    )
    plain = vars(_head(run_of(shared), key, kind).settings)
    offered = inspect.signature(kind.__init__).parameters
    assert {name: plain[name] for name in ("llm", "history_length", "title_tokens")} == {
        "llm": "the-llm",
        "history_length": 6,
        "title_tokens": 9,
    }
    for own in ({"warmup": 0.3}, {"history_length": 8}, {"llm": "another-llm"}):
        assert own.keys() <= offered.keys()
        head = _head(run_of(shared, baselines={key: kind(**own)}), key, kind)
        assert vars(head.settings) == {**plain, **own}


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


MODES = {"llara": None, "llara_constrained": "constrained", "llara_likelihood": "score"}


@pytest.mark.parametrize("order", [*permutations(MODES), *permutations(MODES, 2)])
def test_rows_of_a_method_share_one_tuned_head(order: tuple[str, ...]) -> None:
    tuned: list[Any] = []

    def build(run: Any) -> Any:
        tuned.append(LLaRA("no-model"))
        return tuned[-1]

    run = run_of(LLMHead("no-model"))
    run.shared, run.to_come, run.kept = {}, set(order), set()
    for key in order:
        run.to_come.remove(key)
        row: Any = answering("llara", build, MODES)[key](run)
        assert row.rank_mode == (MODES[key] or "generate")
        assert row._parameters is tuned[0]._parameters
    assert len(tuned) == 1
    assert not run.shared  # nothing of it stays in memory once all rows are there


@pytest.mark.parametrize("kept", ["tallrec", "tallrec_likelihood"])
def test_a_head_whose_other_row_is_kept_does_not_stay_in_memory(
    kept: str, tmp_path: Path, federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it tuned again: it is read, and ranks as it did."""
    shared: dict[str, Any] = {}
    tuned: list[str] = []

    def watched(run: Any, head: Any, key: str) -> Any:
        run.shared = shared
        return llm.tune(run, head, key)

    def counted(run: Any, *rest: Any) -> Any:
        tuned.append(run.name)
        return _trainer(run, *rest)

    _trainer = llm._trainer
    monkeypatch.setattr(published_llm, "tune", watched)
    monkeypatch.setattr(llm, "_trainer", counted)
    before: dict[Path, Any] = {}
    head = LLMHead(llm=str(write_tiny_llm(tmp_path / "llm")), history_length=3, title_tokens=4)
    limits = {"max_test_users": 10, "max_train_users": 8, "calibration_users": 0}
    rows = ["tallrec", "tallrec_likelihood"]
    (made,) = set(rows) - {kept}
    for more in ({}, {"ckpt_path": "last"}):
        trainer = federated_trainer(rounds=1)
        for path in trainer.run_dir.glob(f"results/*/{made}.parquet"):
            before[path] = PerUserResults.load(path)
            path.unlink()
        Experiment(methods=rows, llm=head, **limits).run(
            trainer, small_distiller(), federated_data(), config_hash="these", **more
        )
        assert not shared
    assert sorted(tuned) == ["alpha", "beta"]  # once for both rows
    assert len(before) == 2
    for path, result in before.items():
        again = PerUserResults.load(path)
        assert np.array_equal(again.rank, result.rank)
        assert np.array_equal(again.valid, result.valid)
    assert len(list(trainer.run_dir.glob("results/*/*.parquet"))) == 4


def test_a_tuned_head_is_not_read_again_beside_a_recommender_that_came_out_otherwise(
    tmp_path: Path, federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on trains LLaRA's recommender again; on another machine it ends elsewhere, and the projectors with it."""
    tuned: list[str] = []

    def counted(run: Any, *rest: Any) -> Any:
        tuned.append(run.name)
        return _trainer(run, *rest)

    _trainer = llm._trainer
    monkeypatch.setattr(llm, "_trainer", counted)
    head = LLMHead(llm=str(write_tiny_llm(tmp_path / "llm")), history_length=3, title_tokens=4)
    limits = {"max_test_users": 10, "max_train_users": 8, "calibration_users": 0}
    for more in ({}, {"ckpt_path": "last"}):
        trainer = federated_trainer(rounds=1)
        for path in trainer.run_dir.glob("results/*/llara_likelihood.parquet"):
            path.unlink()
        for path in trainer.run_dir.glob("models/alpha/llara.ckpt"):
            stored = torch.load(path, weights_only=True)
            stored["sfubm_llm"]["item_tables"] = "another recommender's"
            torch.save(stored, path)
        Experiment(methods=["llara", "llara_likelihood"], llm=head, **limits).run(
            trainer, small_distiller(), federated_data(), config_hash="these", **more
        )
    assert sorted(tuned) == ["alpha", "alpha", "beta"]


def test_titles_are_written_freely_or_among_the_candidates_by_one_tuned_head(
    tmp_path: Path, federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[Any] = []

    def watched(run: Any, head: LLMHead, key: str) -> LLMHead:
        tuned.append((run.name, head.settings.form, head.settings.num_layers, head.residual_weights))
        return tune(run, head, key)

    tune = llm.tune
    monkeypatch.setattr(llm, "tune", watched)
    head = LLMHead(llm=str(write_tiny_llm(tmp_path / "llm")), num_layers=1, history_length=3, title_tokens=4)
    trainer = federated_trainer(rounds=1)
    Experiment(methods=[*llm.ANSWERS], llm=head, max_test_users=10, max_train_users=8).run(
        trainer, small_distiller(), federated_data(), config_hash="these"
    )
    assert tuned == [("alpha", "list", None, None), ("beta", "list", None, None)]
    for name in ("alpha", "beta"):
        of = {row: PerUserResults.load(trainer.run_dir / f"results/{name}/{row}.parquet") for row in llm.ANSWERS}
        assert of["sfubm_list_constrained"].valid.all()
        assert of["sfubm_list_likelihood"].valid.all()
        readable = of["sfubm_list"].valid
        assert (of["sfubm_list"].hit1[readable] == of["sfubm_list_constrained"].hit1[readable]).all()
        assert not of["sfubm_list"].hit1[~readable].any()


def test_a_head_starts_from_one_that_was_tuned_on_text(tmp_path: Path, federated_data: Any) -> None:
    llm = str(write_tiny_llm(tmp_path / "llm"))
    settings: dict[str, Any] = {"history_length": 3, "title_tokens": 4, "seed": 1}
    text, head = (LLMHead(llm, **settings) for _ in range(2))
    domain = federated_data().domains["alpha"]
    domain.prepare_data()
    domain.setup("fit")
    text.attach_stage1(None, domain.catalogue)
    stage1 = FKDDistiller(SASRec(hidden_dim=8, num_layers=1, num_heads=1), num_experts=1)
    stage1.bind(domain.catalogue)
    head.attach_stage1(stage1, domain.catalogue)
    tuned = {name: p.detach() + 1.0 for name, p in text.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in tuned} == {"backbone", "head"}
    others = {name: p.detach().clone() for name, p in head.named_parameters() if p.requires_grad and name not in tuned}
    head.start_from(tuned)
    now = dict(head.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in {**tuned, **others}.items())
    assert {name.split(".")[0] for name in others} == {"projector", "residual_weights"}
    with pytest.raises(ConfigError, match=r"'head\.weight' \(1, 3\) has no place in this head"):
        head.start_from({"head.weight": torch.zeros(1, 3)})


def test_text_samples_tune_the_llm_once_for_all_rows_that_have_one_to_tune(
    tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    llm = LLMHead(llm=str(write_tiny_llm(tmp_path / "llm")), history_length=3, title_tokens=4)
    rows, trainer = ["text_lora", "sfubm", "sfubm_no_residual", "sfubm_frozen"], federated_trainer(rounds=1)
    starts: list[str] = []
    states = set[int]()
    original = LLMHead.start_from

    def start_from(self: LLMHead, text: Any) -> None:
        starts.append("with stage 1" if self.residual_weights is not None else "alone")
        states.add(id(text))
        assert any(value.abs().sum() > 0 for name, value in text.items() if "lora_B" in name)  # it was tuned
        original(self, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLMHead, "start_from", start_from)
        limits = {"max_test_users": 10, "max_train_users": 8, "train_candidates": 4}
        Experiment(methods=rows, llm=llm, text_samples=24, **limits).run(trainer, small_distiller(), federated_data())
    assert sorted(starts) == ["alone"] * 4 + ["with stage 1"] * 2  # of two domains; a frozen LLM has nothing to start
    timings = json.loads((trainer.run_dir / "run.json").read_text())["timings"]
    assert len(states) == 2  # one of each domain, for all of its rows
    assert timings["train text_start"]["cpu_s"] > 0
    with pytest.raises(ConfigError, match=r"text_samples must be 0 or more"):
        Experiment(methods=rows, llm=llm, text_samples=-1)


def test_settings_of_the_llm_that_no_row_would_read_are_refused() -> None:
    for settings in ({"form": "list"}, {"rank_mode": "score"}, {"tuning": "frozen"}):
        with pytest.raises(
            ConfigError, match=r"experiment\.text_samples gives adapters and head a start, which experiment"
        ):
            Experiment(methods=["sfubm"], llm=LLMHead(**settings), text_samples=8)
    for row, settings, said in (
        (
            "sfubm_counts",
            {"residual": False},
            "row 'sfubm_counts' is .*counts in its residual', and experiment.llm has no",
        ),
        ("sfubm_products", {"form": "list"}, "row 'sfubm_products' .* has no residual"),
        (
            "text_lora",
            {"tuning": "frozen"},
            "row 'text_lora' is 'Text-only LoRA', and experiment.llm has tuning 'frozen'",
        ),
        ("sfubm", {"count_affinities": True}, "experiment.llm.count_affinities is set by the rows"),
        ("sfubm_counts", {"residual_products": True}, "experiment.llm.residual_products is set by the rows"),
    ):
        with pytest.raises(ConfigError, match=said):
            Experiment(methods=[row], llm=LLMHead(**settings))
    with pytest.raises(ConfigError, match=r"experiment\.llm\.stage1_checkpoint would be read by no row"):
        Experiment(methods=["sfubm"], llm=LLMHead(stage1_checkpoint="stage1.ckpt"))
    baselines: Any = {"llara": LLaRA(stage1_checkpoint="stage1.ckpt")}
    with pytest.raises(ConfigError, match=r"experiment\.baselines\.llara\.stage1_checkpoint would be read by no row"):
        Experiment(methods=["llara"], llm=LLMHead(), baselines=baselines)


@pytest.mark.parametrize("kind", [TALLRec, LLaRA, ALLMRec])
@pytest.mark.parametrize("template", [None, "shopping"])
def test_the_head_of_a_published_method_is_no_llm_that_rows_are_derived_from(kind: Any, template: str | None) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"experiment\.llm is {kind.__name__}, .* the row you want \(tallrec, llara, a_llmrec\) in exp",
    ):
        Experiment(methods=["tallrec", "zero_shot"], llm=kind("no-model", template=template))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"llm": "no/folder/of/a/model/"}, "no/folder"),
        ({"llm": "{empty}"}, "holds no config.json"),
        ({"llm": "{bare}"}, "holds no weights"),
        ({"num_layers": 20}, r"num_layers must lie in 1..2 for .*, got 20"),
        ({"adapter_targets": ".*nomatch"}, "adapter_targets '.*nomatch'"),
        ({"adapter_targets": "("}, r"adapter_targets '\(' is no regular expression"),
        ({"precision": "half"}, "precision 'half'"),
    ],
)
def test_a_language_model_that_cannot_be_had_is_refused_before_anything_is_trained(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    whole, bare, empty = str(write_tiny_llm(tmp_path / "llm")), tmp_path / "bare", tmp_path / "empty"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    empty.mkdir()
    given = {k: v.format(bare=bare, empty=empty) if isinstance(v, str) else v for k, v in settings.items()}
    trainer = quiet_trainer(tmp_path / "run", rounds=1)
    head = LLMHead(**{"llm": whole, **given}, history_length=3, title_tokens=6)
    with pytest.raises(SFUBMError, match=words):
        Experiment(methods=["stage1", "text_lora"], llm=head).run(trainer, small_distiller(), small_federation())
    assert not (tmp_path / "run").exists()
    # No row asks for it: it is neither opened nor named in the report.
    Experiment(methods=["popularity"], llm=head).run(trainer, small_distiller(), small_federation())
    assert json.loads((tmp_path / "run/run.json").read_text())["llm"] == {}
    fine = LLMHead(llm=whole, history_length=3, title_tokens=6)
    check_models(["llara"], fine, {"llara": LLaRA(curriculum=0.3)})
    with pytest.raises(SFUBMError, match=words):
        check_models(["llara"], fine, {"llara": LLaRA(**given)})
