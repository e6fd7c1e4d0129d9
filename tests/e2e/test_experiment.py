"""The main job in small: every row of the table, the report, what is written; resume; W&B (tiny random LLM)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.errors import ConfigError, SFUBMError
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.evaluation.run_folder import RunFolder
from lightning_sfubm.experiment import Experiment
from lightning_sfubm.methods import METHODS
from lightning_sfubm.methods.stage1 import WITHOUT
from lightning_sfubm.modules.baselines.ffmsr import FFMSR
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from tests.callbacks.test_dashboard import offline_wandb, wandb_records  # noqa: F401
from tests.conftest import quiet_trainer, small_distiller, small_federation


def experiment(folder: Path, **settings: Any) -> Experiment:
    llm = LLMHead(llm=str(write_tiny_llm(folder / "llm")), template="shopping", history_length=3, title_tokens=6)
    return Experiment(
        llm=llm,
        align_epochs=1,
        max_test_users=20,
        max_train_users=16,
        train_candidates=4,
        sigmas=[0.0, 0.2],
        **settings,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished experiment, for tests that change nothing in its folder."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SFUBM_CACHE", str(folder / "cache"))
        environment.setenv("PL_GLOBAL_SEED", "3")
        trainer = quiet_trainer(folder / "run", rounds=1)
        report = experiment(folder).run(
            trainer, small_distiller(), small_federation(), command="lightning-sfubm fit", config_hash="h"
        )
    return trainer, report


def test_a_run_that_is_refused_leaves_the_results_of_the_one_before(finished: Any, tmp_path: Path) -> None:
    trainer, _ = finished
    before = {p: p.read_bytes() for p in trainer.run_dir.rglob("*") if p.is_file()}
    again = quiet_trainer(trainer.run_dir, rounds=1)
    with pytest.raises(ConfigError, match=r"no prompt template at .*absent"):
        experiment(tmp_path, templates={"alpha": "absent"}).run(again, small_distiller(), small_federation())
    with pytest.raises(ConfigError, match=r"templates names \['alfa'\]; the domains are alpha, beta: "):
        experiment(tmp_path, templates={"alfa": "movies"}).run(again, small_distiller(), small_federation())
    broken = small_federation()
    broken.setup = lambda stage=None: broken.absent  # type: ignore[method-assign, attr-defined]
    with pytest.raises(AttributeError, match="absent"):
        experiment(tmp_path).run(again, small_distiller(), broken)
    for row, settings, words in (
        ("stage1", {"joins": {"alhpa": 2}}, "joins names 'alhpa'"),
        ("popularity", {"joins": {"alhpa": 2}}, "joins names 'alhpa'"),
        ("stage1", {"callbacks": []}, "item semantics would leave unprotected"),
    ):
        refused: Any = quiet_trainer(trainer.run_dir, rounds=1, **settings)  # type: ignore[arg-type]
        with pytest.raises(SFUBMError, match=words):
            Experiment(methods=[row]).run(refused, small_distiller(), small_federation())
    assert {p: p.read_bytes() for p in trainer.run_dir.rglob("*") if p.is_file()} == before


def test_results_of_an_earlier_run_are_set_aside_and_told(
    federated_data: Any, federated_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in ("popularity", "random"):
        trainer = federated_trainer(rounds=1)
        Experiment(methods=[row]).run(trainer, small_distiller(), federated_data())
    assert [p.stem for p in trainer.run_dir.glob("results/alpha/*.parquet")] == ["random"]
    assert [p.stem for p in trainer.run_dir.glob("results-of-the-run-before/alpha/*.parquet")] == ["popularity"]
    assert "Results of an earlier run lay here" in capsys.readouterr().out


def test_files_of_the_users_own_in_the_run_folder_stay(federated_data: Any, federated_trainer: Any) -> None:
    """By default it is the folder that the command is run in."""
    trainer = federated_trainer(rounds=1)
    own = [trainer.run_dir / name for name in ("data/ratings.csv", "models/llm/w", "local/notes", "results/a.csv")]
    old = [trainer.run_dir / name for name in ("local-2/ledger.jsonl", "models/alpha/sfubm.ckpt")]
    for path in (*own, *old):
        path.parent.mkdir(parents=True)
        path.write_text("")
    Experiment(methods=["popularity"], sigmas=[]).run(trainer, small_distiller(), federated_data())
    assert all(path.is_file() for path in own)
    assert not any(path.exists() for path in old)


@pytest.mark.parametrize("row", ["stage1_with_teacher", "stage1_pooled"])
def test_a_row_of_a_branch_that_stage_1_lacks_is_refused_before_anything_is_trained(
    row: str, federated_data: Any, federated_trainer: Any
) -> None:
    trainer = federated_trainer(rounds=1)
    with pytest.raises(ConfigError, match=f"'{row}' needs the teacher of stage 1, which FFMSR does not"):
        Experiment(methods=["popularity", row]).run(
            trainer, FFMSR(SASRec(16, num_heads=1), text_layers=1), federated_data()
        )
    assert not list(trainer.run_dir.glob("checkpoints"))


@pytest.mark.parametrize("row", ["late_fusion", "sfubm", "text_lora", "tallrec", "llara_likelihood"])
def test_a_row_that_has_no_held_out_positions_is_refused_before_anything_is_trained(
    row: str, tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    trainer, data = federated_trainer(rounds=1), federated_data()
    llm = LLMHead(str(write_tiny_llm(tmp_path / "llm")))
    data.domains["beta"] = data.domains["beta"].without_holdout()
    with pytest.raises(ConfigError, match=f"'{row}' is fitted on .* domain 'beta' has none"):
        Experiment(methods=["popularity", row], llm=llm).run(trainer, small_distiller(), data)
    assert not list(trainer.run_dir.glob("checkpoints"))


def test_rows_that_are_kept_are_said_to_be(
    tmp_path: Path, federated_data: Any, federated_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for ckpt_path in (None, "last"):
        assert ", kept\n" not in capsys.readouterr().out
        Experiment(methods=["popularity"]).run(
            federated_trainer(rounds=1), small_distiller(), federated_data(), ckpt_path=ckpt_path, config_hash="h"
        )
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith(", kept")]
    assert [line.split(":")[0] for line in said] == ["alpha", "beta"]


def test_rows_that_are_kept_take_their_places_in_the_table_of_the_run_that_goes_on(
    federated_data: Any, federated_trainer: Any
) -> None:
    def rows(*methods: str, ckpt_path: str | None = "last", max_test_users: int | None = 20) -> dict[str, list[str]]:
        trainer = federated_trainer(rounds=1)
        experiment = Experiment(methods=list(methods), max_test_users=max_test_users)
        experiment.run(trainer, small_distiller(), federated_data(), ckpt_path=ckpt_path, config_hash="h")
        results = RunFolder.read(trainer.run_dir).results
        return {domain: [row.meta.method for row in found] for domain, found in results.items()}

    rows("popularity", "random", ckpt_path=None)
    found = rows("text_similarity", "random", "popularity")
    assert {"alpha", "beta", "alpha, all users", "beta, all users"} <= set(found)
    for domain, methods in found.items():
        assert methods == ["text_similarity", "random", "popularity"], domain
    for domain, methods in rows("popularity", "text_similarity").items():  # a row that is no more asked for comes last
        assert methods == ["popularity", "text_similarity", "random"], domain


def test_messages_of_an_earlier_run_are_not_told_of_one_that_sends_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run/checkpoints/state-000001").mkdir(parents=True)
    earlier = {"ledger.jsonl", "history.jsonl", "audit.json", "privacy_report.html", "privacy_report.json"}
    for name in earlier:
        (tmp_path / "run" / name).write_text("{}\n")
    experiment(tmp_path, methods=["popularity"]).run(
        quiet_trainer(tmp_path / "run", rounds=1), small_distiller(), small_federation()
    )
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert not left & {*earlier, "checkpoints"}
    aside = {p.name for p in (tmp_path / "run/record-of-the-run-before").iterdir()}
    assert aside == earlier - {"history.jsonl"}
    assert "holds an earlier run: the record of its 1 messages is in " in caplog.text


def test_an_experiment_in_one_domain_is_refused_in_one_sentence(
    tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    with pytest.raises(
        ConfigError, match=r"and data has none: a configuration of configs/domain is for one model alone"
    ):
        Experiment(methods=["popularity"]).run(
            federated_trainer(rounds=1), small_distiller(), federated_data(domains=1).domains["alpha"]
        )
    assert not (tmp_path / "run").exists()


def test_every_method_ranks_the_same_candidates_of_the_same_users(finished: Any) -> None:
    trainer, _ = finished
    for domain in ("alpha", "beta"):
        rows = [PerUserResults.load(p) for p in sorted((trainer.run_dir / "results" / domain).glob("*.parquet"))]
        assert {r.meta.method for r in rows} == set(METHODS)
        assert len({r.meta.candidate_hash for r in rows}) == 1
        assert len({tuple(sorted(r.user.tolist())) for r in rows}) == 1
        assert {len(r) for r in rows} == {20}
        by_user = {r.meta.method: dict(zip(r.user.tolist(), r.target.tolist(), strict=True)) for r in rows}
        assert len({json.dumps(sorted(v.items())) for v in by_user.values()}) == 1
        everyone = trainer.run_dir / "results" / f"{domain}, all users"
        wide = {p.stem: PerUserResults.load(p) for p in everyone.glob("*.parquet")}
        assert set(wide) == {m for m, spec in METHODS.items() if not spec.needs_llm}
        assert all(len(r) > 20 for r in wide.values())
    llm = PerUserResults.load(trainer.run_dir / "results" / "alpha" / "sfubm.parquet")
    frozen = PerUserResults.load(trainer.run_dir / "results" / "alpha" / "zero_shot.parquet")
    assert llm.meta.trainable_params
    assert frozen.meta.trainable_params == 0
    for method in ("tallrec", "llara", "a_llmrec"):
        words, ranks = (
            PerUserResults.load(trainer.run_dir / "results" / "alpha" / f"{row}.parquet")
            for row in (method, f"{method}_likelihood")
        )
        assert ranks.valid.all()
        assert len(set(ranks.rank.tolist())) > 2  # a whole order, not one chosen candidate
        assert set(words.rank.tolist()) <= {1, 20}
        assert ranks.meta.trainable_params == words.meta.trainable_params


def test_the_run_folder_and_the_report_say_what_happened(finished: Any) -> None:
    trainer, report = finished
    run = json.loads((trainer.run_dir / "run.json").read_text())
    assert run["command"] == "lightning-sfubm fit"
    assert run["seed"] == 3
    fusions = {"late_fusion", "late_fusion_counts", "late_fusion_products", "late_fusion_products_beside_own"}
    assert {c["a"] for c in run["comparisons"]} == {
        "stage1",
        "sfubm",
        "stage1_beside_own",
        "stage1_with_teacher",
        *fusions,
    }
    assert any(name.startswith("train sfubm") for name in run["timings"])
    privacy = json.loads((trainer.run_dir / "privacy.json").read_text())
    assert [(e["sigma"], e["used"]) for e in privacy["alpha"]] == [(0.0, False), (0.05, True), (0.2, False)]
    page = report.read_text()
    for words in ("SF-UBM", "Zero-shot LLM", "Late fusion", "linkage", "not differential privacy", "alpha", "beta"):
        assert words.lower() in page.lower()
    facts = json.loads(report.with_suffix(".json").read_text())
    assert {d["name"] for d in facts["domains"]} >= {"alpha", "beta"}
    assert facts["communication"]["messages"] > 0


def test_students_alone_have_seeds_of_their_own_and_sums_count_both_trainings(finished: Any) -> None:
    trainer, _ = finished
    first, second = (trainer.local_twin(small_distiller(), "alpha", number) for number in (1, 2))
    assert (trainer.run_dir / "local-2").is_dir()
    assert not any(client.module.training for client in (first, second, trainer.loop.clients["alpha"]))
    assert first.seed == trainer.loop.seed != second.seed
    assert not first.module.ids.weight.equal(second.module.ids.weight)
    rows = {m: PerUserResults.load(trainer.run_dir / "results" / "alpha" / f"{m}.parquet").meta for m in METHODS}
    for row, parts in {
        "stage1_beside_own": ("stage1", "stage1_local"),
        "stage1_local_twice": ("stage1_local",),
    }.items():
        assert rows[row].trainable_params == 2 * rows["stage1"].trainable_params
        assert rows[row].extra["train_cpu_s"] >= sum(rows[part].extra["train_cpu_s"] for part in parts)
    assert rows["stage1_with_teacher"].trainable_params == rows["stage1"].trainable_params
    assert rows["stage1_with_teacher"].extra["train_cpu_s"] == rows["stage1"].extra["train_cpu_s"]
    assert rows["stage1_local_twice"].extra["train_cpu_s"] > rows["stage1_local"].extra["train_cpu_s"]
    # What a silo trained alone has a row of its own, whichever asks first: a fusion costs what it takes to weigh it.
    assert rows["late_fusion_products_local"].trainable_params == 10 * 13 // 2
    for row in (
        "late_fusion_products_local_twice",
        "late_fusion_products_beside_own",
    ):  # scores of two, and two teachers'
        assert rows[row].trainable_params == 12 * 15 // 2
        assert rows[row].extra["train_cpu_s"] < rows["stage1_local"].extra["train_cpu_s"]
    # Stage 1 is a row of its own; the UniSRec that is fused is not, for its own row has the held-out positions besides.
    products = 9 * 12 // 2
    assert rows["unisrec_fusion_products"].trainable_params == rows["unisrec_scratch"].trainable_params + products
    assert (trainer.run_dir / "clients" / "alpha" / "unisrec_fusion_products").is_dir()


def test_a_resumed_run_keeps_finished_rows(
    finished: Any, tmp_path: Path, federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0].run_dir, tmp_path / "run")
    results = tmp_path / "run" / "results"
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.parquet")}
    lost = results / "beta" / "late_fusion.parquet"
    expected = PerUserResults.load(lost)
    lost.unlink()
    again = federated_trainer(rounds=1)
    experiment(tmp_path).run(
        again, small_distiller(), federated_data(), ckpt_path="last", command="again", config_hash="h"
    )
    after = {p: p.stat().st_mtime_ns for p in results.rglob("*.parquet")}
    assert {p for p in after if after[p] != before[p]} <= {lost, results / "beta, all users" / "late_fusion.parquet"}
    assert (PerUserResults.load(lost).rank == expected.rank).all()
    said = "are those of its last process alone"  # stage 1 and the other rows took no time in it
    assert said in (tmp_path / "run/report.html").read_text()
    assert said not in (finished[0].run_dir / "report.html").read_text()


def test_rows_of_other_settings_are_not_reported_beside_new_ones(
    finished: Any, tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    shutil.copytree(finished[0].run_dir, tmp_path / "run")
    rows = tmp_path / "run" / "results"
    assert len(list(rows.rglob("*.parquet"))) > 4
    Experiment(methods=["popularity"]).run(
        federated_trainer(rounds=1), small_distiller(), federated_data(), ckpt_path="last", config_hash="other"
    )
    assert {str(p.relative_to(rows)) for p in rows.rglob("*.*")} == {
        f"{domain}/popularity.{end}" for domain in ("alpha", "beta") for end in ("json", "parquet")
    }
    aside = tmp_path / "run" / "results-of-other-settings"  # what took hours is not deleted
    assert PerUserResults.load(aside / "beta" / "late_fusion.parquet").meta.extra["config_hash"] == "h"


def test_methods_without_an_llm_need_none(tmp_path: Path, federated_data: Any, federated_trainer: Any) -> None:
    report = Experiment(methods=["popularity", "stage1"]).run(
        federated_trainer(rounds=1), small_distiller(), federated_data(domains=1)
    )
    assert report.exists()
    assert {p.stem for p in (report.parent / "results" / "alpha").glob("*.parquet")} == {"popularity", "stage1"}


def test_rows_outside_the_federation_need_no_rounds(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1)
    report = Experiment(methods=["random", "encoder"]).run(trainer, small_distiller(), federated_data())
    assert {p.stem for p in (report.parent / "results" / "alpha").glob("*.parquet")} == {"random", "encoder"}
    assert trainer.loop.counters.round == 0
    assert not (report.parent / "ledger.jsonl").exists()


def test_a_student_less_nothing_is_the_student_itself(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that leave out a part differ from stage 1 by that part alone: teacher, first weights and batches are the same."""
    monkeypatch.setitem(WITHOUT, "stage1_no_fact", ("", ()))
    rows = ["stage1", "stage1_no_fact", "stage1_no_counter"]
    trainer = federated_trainer(rounds=1)
    Experiment(methods=rows).run(trainer, small_distiller(), federated_data())
    whole, same, other = (
        PerUserResults.load(trainer.run_dir / "results" / "alpha" / f"{row}.parquet").rank.tolist() for row in rows
    )
    assert same == whole != other


def test_a_wandb_run_holds_rounds_clients_privacy_and_the_table(
    offline_wandb: Path,  # noqa: F811
    federated_data: Any,
    federated_trainer: Any,
) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="test", save_dir=str(offline_wandb), offline=True)
    trainer = federated_trainer(flags={"logger": logger, "log_every_n_steps": 1})
    Experiment(methods=["popularity", "stage1"], sigmas=[0.1]).run(trainer, small_distiller(), federated_data())
    wandb.finish()
    wandb.teardown()
    found: dict[str, list[str]] = {}
    for record in wandb_records(next(offline_wandb.rglob("run-*.wandb"))):
        for item in record.history.item:
            found.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    assert [json.loads(v) for v in found["fed/round"]] == [1, 2]
    for client in ("alpha", "beta"):
        history = [json.loads(line) for line in (trainer.run_dir / "history.jsonl").read_text().splitlines()]
        rounds = [h["metrics"]["val/ndcg@10"] for h in history if h["client"] == client and h["round"]]
        assert [json.loads(v) for v in found[f"fed/{client}/val/ndcg@10"]] == pytest.approx(rounds)
        assert len(found[f"{client}/val/ndcg@10"]) == sum(h["client"] == client for h in history)
        assert f"privacy/{client}/cosine_mean" in found
        assert f"results/{client}/stage1/hit@1" in found
    assert any(name.startswith("results/table") for name in found)
