"""Which cells a table takes, what it tells of the others, and what two commands may do at once."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.grid import named_files
from lightning_sfubm.grid.cells import all_cells, without_users
from lightning_sfubm.grid.command import results
from lightning_sfubm.grid.comparisons import by_seed, comparisons
from lightning_sfubm.grid.named_files import named_models
from lightning_sfubm.grid.runner import run_grid
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.grid.tables import left_out, ordered
from lightning_sfubm.locks import locked
from lightning_sfubm.methods import METHODS
from tests.grid.stand_ins import FakeFit, grid_file, stored
from tests.test_locks import holder


def changed(path: Path, **entries: Any) -> None:
    """A stored cell with other entries; ``None`` takes one away."""
    cell = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in cell.items() if entries.get(key, "kept") is not None}))


def publish(path: Path, out: Path, public: Path, **entries: Any) -> None:
    """Copy a stored cell to the published ones."""
    to = public / path.relative_to(out)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(without_users(json.loads(path.read_text())) | entries))


def test_a_stale_cell_gives_way_to_the_published_one_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, public = tmp_path / "out", tmp_path / "public"
    out.mkdir()
    for method, hits in (("stage1", [1, 1]), ("popularity", [0, 1])):
        publish(stored(out, method, hits), out, public)
    changed(stored(out, "stage1", [0, 0]), settings_hash="of yesterday")
    stored(out, "popularity", [0, 0])
    grid = load_grid(out / "grid.yaml", set(METHODS))
    cells = all_cells(out, public)
    (methods,) = ordered(grid, cells).values()
    assert {name: [c["metrics"]["hit@1"]["value"] for c in of] for name, of in methods.items()} == {
        "stage1": [1.0],
        "popularity": [0.0],  # both are current: the one at hand counts
    }
    results(["--grid", str(out / "grid.yaml"), "--out", str(out), "--publish", str(public), "--tables-only"])
    assert (
        "Left out, computed with other settings, or of another row, than the grid has now: p/stage1/1.\n"
        in capsys.readouterr().out
    )
    publish(out / "cells/p/a/popularity/seed1.json", out, public, settings_hash="of yesterday")
    assert left_out(grid, all_cells(out, public))[0].endswith(" p/stage1/1, p/popularity/1 (published).")


def test_a_cell_that_does_not_say_its_settings_is_not_taken_for_current(tmp_path: Path) -> None:
    stored(tmp_path, "stage1", [1, 1])
    for method in ("popularity", "encoder"):  # the second is not of the grid
        changed(stored(tmp_path, method, [0, 1]), settings_hash=None, grid_hash=None)
    grid = load_grid(tmp_path / "grid.yaml", set(METHODS))
    cells = all_cells(tmp_path)
    assert set(ordered(grid, cells)["p", "a"]) == {"stage1"}
    (told,) = left_out(grid, cells)
    assert told.startswith("Left out, not known to be current")
    assert told.endswith(": p/encoder/1, p/popularity/1.")


def test_a_cell_that_does_not_say_its_data_is_made_again_of_a_row_that_does(tmp_path: Path, fit: FakeFit) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    out = tmp_path / "out"
    run_grid(grid, out, None, ["p/v/1"], None)
    changed(out / "cells/p/a/v/seed1.json", grid_hash=None)
    assert run_grid(grid, out, None, ["p/v/1"], None) == []
    assert len(fit.calls) == 1
    assert "grid_hash" in json.loads((out / "cells/p/a/v/seed1.json").read_text())


def test_pooled_differences_are_of_the_seeds_that_all_domains_have(tmp_path: Path) -> None:
    for domain, seeds in (("a", (1, 2)), ("b", (2,)), ("c", (1, 2))):
        for seed in seeds:
            stored(tmp_path, "popularity", [0, 0, 0, 0], domain=domain, seed=seed)
            stored(tmp_path, "stage1", [1, 1, 1, 1] if seed == 1 else [1, 0, 0, 0], domain=domain, seed=seed)
    grid = load_grid(tmp_path / "grid.yaml", set(METHODS))
    facts = comparisons(grid, ordered(grid, all_cells(tmp_path)))
    assert [(f["domain"], f["seeds"], f["users"], f["difference"]) for f in facts] == [
        ("a", 2, 4, pytest.approx(0.625)),
        ("b", 1, 4, pytest.approx(0.25)),
        ("c", 2, 4, pytest.approx(0.625)),
        ("pooled", 1, 12, pytest.approx(0.25)),
    ]
    assert facts[-1]["p_flip"] == pytest.approx(0.25)  # of seed 2: three wins, no loss
    stored(tmp_path, "stage1", [1, 0, 0, 0], domain="b")
    changed(tmp_path / "cells/p/b/stage1/seed2.json", per_user=None)
    facts = comparisons(grid, ordered(grid, all_cells(tmp_path)))
    assert [fact["domain"] for fact in facts] == ["a", "c"]  # nothing is pooled of some of the domains alone


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("model: {template: words.yaml}\n", []),
        ("experiment: {templates: {a: '%s/words.yaml'}}\n", []),
        ("data: overlay.yml\n", []),  # which names it
        ("seed_everything: 1\n", ["--experiment.init_args.templates", "{a: %s/words.yaml}"]),
        ("seed_everything: 1\n", ["--config=%s/overlay.yml"]),
    ],
)
def test_the_hash_of_a_run_follows_the_files_that_it_names(tmp_path: Path, text: str, flags: list[str]) -> None:
    flags = [flag.replace("%s", str(tmp_path)) for flag in flags]
    path = grid_file(tmp_path, runs={"main": {"rows": ["stage1"], "flags": flags}}, comparisons=[])
    (tmp_path / "base.yaml").write_text(text.replace("%s", str(tmp_path)))
    (run,) = load_grid(path, set(METHODS)).runs
    hashes = [run.settings_hash()]
    (tmp_path / "overlay.yml").write_text("template: words.yaml\n")
    for words in ("noun: film\n", "noun: book\n", "noun: [\n"):
        (tmp_path / "words.yaml").write_text(words)
        hashes.append(run.settings_hash())
        assert run.settings_hash() == run.settings_hash()
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("edited", ["base", "movies"])
def test_the_hash_of_a_run_follows_the_shipped_templates_that_its_prompts_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    grid = grid_file(tmp_path, runs={"main": {"rows": ["stage1"]}}, comparisons=[])
    (tmp_path / "base.yaml").write_text("experiment: {templates: {a: movies}}\n")
    (run,) = load_grid(grid, set(METHODS)).runs
    shipped = shutil.copytree(named_files.TEMPLATE_DIR, tmp_path / "templates")
    monkeypatch.setattr(named_files, "TEMPLATE_DIR", shipped)
    before = run.settings_hash()
    for name, changes in ((edited, False), ("books", False), (edited, True)):
        text = (shipped / f"{name}.yaml").read_text()
        (shipped / f"{name}.yaml").write_text(f"# a remark\n{text}" + ("system: Be brief.\n" if changes else ""))
        assert (run.settings_hash() != before) == changes
    (tmp_path / "base.yaml").write_text("experiment: {templates: {a: words}}\n")  # no template
    assert named_files.named_files(run.configs, run.flags) == []


@pytest.mark.parametrize("flags", [["--model.init_args.llm={folder}"], ["--config", "{overlay}"]])
def test_a_run_is_computed_again_where_its_local_model_has_changed(
    tmp_path: Path, fit: FakeFit, flags: list[str]
) -> None:
    folder, overlay = tmp_path / "llm", tmp_path / "overlay.yaml"
    folder.mkdir()
    overlay.write_text(f"model: {{init_args: {{llm: {folder}}}}}\n")
    flags = [flag.format(folder=folder, overlay=overlay) for flag in flags]
    path = grid_file(tmp_path, runs={"v": {"rows": ["stage1"], "flags": flags}}, comparisons=[])
    grid, out = load_grid(path, set(METHODS)), tmp_path / "out"
    for number, weights in enumerate(("one", "one", "two"), 1):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(weights)
        os.utime(folder / "model.safetensors", ns=(number, number))  # as a file system with coarse times might not
        assert run_grid(grid, out, None, [], None) == []
        assert len(fit.calls) == (1 if weights == "one" else 2)
    (run,) = grid.runs
    assert list(named_models(run.configs, run.flags)) == [f"model {folder}"]
    (folder / "config.json").unlink()  # then it is no model
    assert named_models(run.configs, [*run.flags, "~nobody-of-this-name", "smollm2-135m", "a\0b"]) == {}


def test_comments_layout_and_methods_of_a_configuration_make_no_cell_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_grid(grid_file(tmp_path), set(METHODS)).runs[0]

    def of(text: str) -> str:
        (tmp_path / "base.yaml").write_text(text)
        return run.settings_hash()

    for name in ("words.yaml", "data.csv"):  # a comment names nothing; data are in the hash of the data
        (tmp_path / name).write_text("x")
    first = of(
        "seed_everything: 1  # words.yaml\ndata: data.csv\nexperiment: {init_args: {methods: [stage1], align: 2}}\n"
    )
    again = "data: data.csv\nexperiment:\n  init_args:\n    align: 2\n    methods: [a, b]\nseed_everything: 1\n"
    assert of(again) == of(again.replace("    methods: [a, b]\n", "")) == first
    assert of(again.replace("align: 2", "align: 3")) != first != of(again.replace("data.csv", "other.csv"))
    published = "39e26d701cb2813c68987567049e317223a46b4a9e6498d84babf2dcd8971e1f"
    assert of("seed_everything: 1\ndata: data.csv\n") == published  # as in the cells under docs/results


def test_a_setting_that_says_what_was_always_done_makes_no_cell_out_of_date(tmp_path: Path) -> None:
    def of(base: str, overlay: str = "{}\n", *flags: str) -> str:
        path = grid_file(
            tmp_path,
            runs={"main": {"rows": ["stage1"], "config": str(tmp_path / "over.yaml"), "flags": list(flags)}},
            comparisons=[],
        )
        (tmp_path / "base.yaml").write_text(base)
        (tmp_path / "over.yaml").write_text(overlay)
        (run,) = load_grid(path, set(METHODS)).runs
        return run.settings_hash()

    def domains(a: str, b: str) -> str:
        return f"data: {{domains: {{a: {{name: a{a}}}, b: {{name: b{b}}}}}}}\n"

    nothing, off, on = "", ", even_batches: false", ", even_batches: true"
    before = json.dumps([[{"data": {"domains": {"a": {"name": "a"}, "b": {"name": "b"}}}}, {}], [], 1])
    assert of(domains(off, off)) == hashlib.sha256(before.encode()).hexdigest()  # as cells of before have it
    flag = ("--data.init_args.domains.a.even_batches", "true")
    forms = [(off, off), (on, on), (off, on), (on, off), (nothing, nothing), (off, nothing), (nothing, off)]
    assert len({*(of(domains(*form)) for form in forms), of(domains(off, off), "{}\n", *flag)}) == 8


def test_the_only_row_of_a_variant_gives_its_place_to_another_one(tmp_path: Path, fit: FakeFit) -> None:
    out = tmp_path / "out"
    for row in ("stage1", "late_fusion_products"):  # both are called like the variant, of the same settings
        path = grid_file(tmp_path, runs={"v": {"rows": {row: f"Variant of {row}"}}}, comparisons=[])
        grid = load_grid(path, set(METHODS))
        old = all_cells(out)
        assert ordered(grid, old) == {}
        assert len(left_out(grid, old)) == bool(old)
        assert run_grid(grid, out, None, [], None) == []
        assert {cell["row"] for cell in all_cells(out)} == {row}
        assert set(ordered(grid, all_cells(out))["p", "a"]) == {"v"}
    assert fit.computed == ["stage1", "late_fusion_products"]
    assert run_grid(grid, out, None, [], None) == []
    assert len(fit.calls) == 2


def test_differences_of_other_users_than_the_cells_have_no_seed_by_seed(tmp_path: Path) -> None:
    stored(tmp_path, "popularity", [0, 0, 1])
    stored(tmp_path, "stage1", [1, 1])
    grid = load_grid(tmp_path / "grid.yaml", set(METHODS))
    tables = ordered(grid, all_cells(tmp_path))
    (fact,) = comparisons(grid, tables)
    assert (fact["users"], fact["difference"]) == (2, 1.0)
    assert by_seed(tables, fact) == []  # the means of the cells differ by 2/3, of three users and two


def test_a_configuration_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    run = load_grid(grid_file(tmp_path), set(METHODS)).runs[0]
    for text in (b"a: [", b"\xff", b"day: 2020-13-45\n"):
        (tmp_path / "base.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=r"base.yaml is not readable YAML"):
            run.settings_hash()
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(ConfigError, match=r"base.yaml is not there$"):
        run.settings_hash()


def test_a_second_command_on_the_same_folder_is_refused_but_for_tables(
    tmp_path: Path, fit: FakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--grid", str(grid_file(tmp_path)), "--out", str(out)]
    other = holder(out)
    with pytest.raises(ConfigError, match=r"/out: another process is at work there.* by --out$"):
        results(arguments)
    assert fit.calls == []
    other.communicate()
    results(arguments)
    assert len(fit.calls) == 3
    other = holder(out)
    results([*arguments, "--tables-only"])
    other.communicate()
    assert len(fit.calls) == 3


def test_tables_of_no_cell_are_refused_and_nothing_is_written(tmp_path: Path, fit: FakeFit) -> None:
    out, public, grid = tmp_path / "out", tmp_path / "public", grid_file(tmp_path)
    arguments = ["--grid", str(grid), "--out", str(out), "--tables-only"]
    for publish, where in ([], f"{out} holds"), (["--publish", str(public)], f"{out} and {public} hold"):
        with pytest.raises(
            ConfigError, match=rf"^{where} no cell of {grid}: leave --tables-only out to compute some, or"
        ):
            results([*arguments, *publish])
    assert not out.exists()
    assert not public.exists()
    out.mkdir()
    changed(stored(out, "popularity", [0, 1]), pair="of another grid")
    with pytest.raises(ConfigError, match="no cell of"):
        results(arguments)
    assert not (out / "tables.md").exists()


def test_tables_of_published_cells_alone_are_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, public = tmp_path / "out", tmp_path / "public"
    out.mkdir()
    path = stored(out, "popularity", [0, 1])
    publish(path, out, public)
    path.unlink()
    results(["--grid", str(out / "grid.yaml"), "--out", str(out), "--publish", str(public), "--tables-only"])
    assert "Popularity" in capsys.readouterr().out


def test_the_folder_of_a_run_still_at_work_is_not_cleared(
    tmp_path: Path, fit: FakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit may outlive the command that started it. The other runs go on."""
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    folder = tmp_path / "out/runs/p/v/1"
    other = holder(folder)
    (folder / "ledger.jsonl").write_text("of another's\n")
    assert run_grid(grid, tmp_path / "out", None, [], None) == ["p/v/1"]
    assert "another process is at work there" in " ".join(capsys.readouterr().out.split())
    assert len(fit.calls) == 2
    assert (folder / "ledger.jsonl").exists()
    other.communicate()
    with locked(tmp_path / "out", "--out"):
        assert run_grid(grid, tmp_path / "out", None, ["p/v/1"], None) == []
    assert not (folder / "ledger.jsonl").exists()


def test_a_run_whose_states_this_version_cannot_read_starts_again(tmp_path: Path, fit: FakeFit) -> None:
    grid, out = load_grid(grid_file(tmp_path), set(METHODS)), tmp_path / "out"
    assert run_grid(grid, out, None, ["p/v/1"], None) == []
    for cell in out.glob("cells/**/*.json"):
        cell.unlink()
    loop = out / "runs/p/v/1/checkpoints/state-0004/loop.json"
    loop.parent.mkdir()
    loop.write_text(json.dumps({"format": 1, "files": {}}))
    assert run_grid(grid, out, None, ["p/v/1"], None) == []
    assert "--ckpt_path" not in fit.calls[-1]
    assert not loop.exists()
