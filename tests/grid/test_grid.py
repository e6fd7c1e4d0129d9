"""The results grid: what a grid file may say, what is computed again, and what the tables state."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.grid import runner
from lightning_sfubm.grid.cells import all_cells, cell_path, read_cell, results_of, without_users
from lightning_sfubm.grid.command import results
from lightning_sfubm.grid.comparisons import comparisons
from lightning_sfubm.grid.spec import Grid, cell_hash, load_grid
from lightning_sfubm.grid.tables import markdown, ordered, summary
from lightning_sfubm.methods import METHODS
from tests.grid.stand_ins import FakeFit, grid_file, stored

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": {"main": {"rows": ["stage1", "nonsense"]}}}, "runs.main.rows names ['nonsense']"),
        ({"runs": {"main": {"rows": ["stage1"], "sead": 1}}}, "unknown entry 'runs.main.sead'"),
        ({"runs": {"main": {}}}, "runs.main needs 'rows'"),
        ({"pairs": {"p": "nowhere.yaml"}}, "pairs.p names nowhere.yaml, which is not there"),
        ({"runs": {"main": {"rows": ["stage1"], "config": "no.yaml"}}}, "runs.main.config names no.yaml"),
        ({"runs": {"main": {"rows": ["stage1"], "pairs": ["q"]}}}, "runs.main.pairs names 'q'"),
        ({"comparisons": [["stage1", "sfubm"]]}, "must name two of its methods"),
        ({"extra": 1}, "unknown entry 'extra'"),
        (
            {"runs": {"main": {"rows": ["stage1", "gru4rec"]}, "gru4rec": {"rows": {"stage1": "Stage 1 on a GRU"}}}},
            "runs.main and runs.gru4rec both compute the row 'gru4rec' of seed 1",
        ),
    ],
)
def test_a_bad_grid_is_refused_by_entry(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")):
        load_grid(grid_file(tmp_path, **changes), set(METHODS))


def main_run(**entries: Any) -> dict[str, Any]:
    return {"runs": {"main": {"rows": ["stage1"], **entries}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": []}, "runs must be a mapping by name with at least one entry, not []"),
        ({"runs": {}}, "runs must be a mapping by name with at least one entry, not {}"),
        ({"runs": {"main": [1]}}, "runs.main needs 'rows'"),
        ({"pairs": ["x"]}, "pairs must be a mapping by name with at least one entry, not ['x']"),
        ({"pairs": None}, "pairs must be a mapping by name with at least one entry, not None"),
        ({"pairs": {"p": None}}, "pairs.p names no configuration file"),
        ({"pairs": {"p": [["x"]]}}, "pairs.p names ['x'], which is not there"),
        ({"pairs": {"p": "x" * 5000}}, "which is not there"),
        ({"pairs": {"p": "a\0b"}}, "which is not there"),
        (main_run(seeds=["x"]), "runs.main.seeds names 'x'; a seed is an integer from 0"),
        (main_run(seeds=[1.5]), "runs.main.seeds names 1.5"),
        (main_run(seeds=[True]), "runs.main.seeds names True"),
        (main_run(seeds=-1), "runs.main.seeds names -1"),
        (main_run(seeds={"a": 1}), "runs.main.seeds names {'a': 1}"),
        (main_run(rows=5), "runs.main.rows must be a list of rows, or a mapping of rows to their labels, not 5"),
        (main_run(rows="stage1"), "runs.main.rows must be a list of rows"),
        (main_run(rows=[[1]]), "runs.main.rows names [[1]]"),
        (main_run(flags=5), "runs.main.flags starts with 5"),
        (main_run(flags=["--a", ["b"]]), "runs.main.flags holds ['b']"),
        (main_run(flags={"a": "b"}), "runs.main.flags holds {'a': 'b'}"),
        (main_run(flags=[None]), "runs.main.flags holds None"),
        (main_run(flags=["--seed_everything", "7"]), "flags holds --seed_everything, which the grid sets itself: name"),
        (main_run(flags=["--model.init_args.seed=7"]), "flags holds --model.seed, which the grid sets itself: name"),
        (
            main_run(flags=["--experiment.methods", "[a]"]),
            "--experiment.methods, which the grid sets itself: name the rows",
        ),
        (main_run(flags=["--trainer.default_root_dir", "x"]), "which the grid sets itself: give --out to the command"),
        (main_run(pairs=[["p"]]), "runs.main.pairs names '['p']'"),
        (main_run(config=5), "runs.main.config names 5, which is not there"),
        ({"comparisons": 5}, "comparisons must be a list of pairs of methods, not 5"),
        ({"comparisons": [1]}, "comparison 1 must name two of its methods"),
        ({"comparisons": [[["stage1"], "popularity"]]}, "comparison [['stage1'], 'popularity'] must name two"),
        ({"comparisons": ["ab"]}, "comparison 'ab' must name two"),
        ({"title": ["T"]}, "title must be text, not ['T']"),
        ({"pairs": {"../p": "x.yaml"}}, "pairs: the name '../p' cannot be a file name"),
        ({"runs": {"a/b": {"rows": ["stage1"]}}}, "runs: the name 'a/b' cannot be a file name"),
        ({"runs": {".": {"rows": ["stage1"]}}}, "runs: the name '.' cannot be a file name"),
        ({"runs": {"": {"rows": ["stage1"]}}}, "runs: the name '' cannot be a file name"),
        ({"runs": {"a\0": {"rows": ["stage1"]}}}, "cannot be a file name"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_one_sentence_that_names_it(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refusal:
        load_grid(grid_file(tmp_path, **changes), set(METHODS))
    assert str(refusal.value).startswith(f"grid {tmp_path / 'grid.yaml'}: ")
    assert len(str(refusal.value).splitlines()) == 1


def test_a_name_that_is_no_text_is_told_to_be_quoted(tmp_path: Path) -> None:
    path = grid_file(tmp_path)
    path.write_text(f"pairs: {{1: {tmp_path / 'base.yaml'}}}\nruns: {{main: {{rows: [stage1]}}}}\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml: pairs: the name 1 is no text; write it in quotes"):
        load_grid(path, set(METHODS))


@pytest.mark.parametrize("text", ["pairs: [", "title: 2020-99-99", "[" * 5000, "\udcff"])
def test_broken_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"g\.yaml is not readable YAML"):
        load_grid(path, set(METHODS))


def test_a_grid_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^grid .*g\.yaml is not there$"):
        load_grid(tmp_path / "g.yaml", set(METHODS))


GRIDS = [*sorted((ROOT / "configs" / "results").glob("*.yaml")), ROOT / "benchmarks" / "stage1_grid.yaml"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_every_shipped_grid_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_grid(path, set(METHODS)).runs
    assert path.read_text().startswith(f"# lightning-sfubm results --grid {path.relative_to(ROOT)}")


def test_the_grid_of_the_how_to_page_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "how-to" / "compare-methods.md").read_text()
    overlay, grid = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_encoder.yaml").write_text(overlay)
    (tmp_path / "my_grid.yaml").write_text(grid)
    monkeypatch.chdir(tmp_path)
    loaded = load_grid(Path("my_grid.yaml"), set(METHODS))
    assert [run.key for run in loaded.select(["films/*/1"])] == ["films/published/1", "films/ours/1"]


def test_runs_and_selection(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    assert [run.key for run in grid.runs] == ["p/main/1", "p/main/2", "p/v/1"]
    assert grid.runs[2].rows == {"stage1": "v"}
    assert grid.runs[2].labels == {"v": "A variant"}
    assert [run.key for run in grid.select(["*/main/*"])] == ["p/main/1", "p/main/2"]
    with pytest.raises(ConfigError, match="matches no run"):
        grid.select(["q/*"])


def test_the_hash_of_a_cell_follows_config_seed_and_data(tmp_path: Path) -> None:
    first, second, _ = load_grid(grid_file(tmp_path), set(METHODS)).runs
    before = first.settings_hash()
    assert before == first.settings_hash() != second.settings_hash()
    assert cell_hash(before, {"a": "1"}) == cell_hash(before, {"a": "1"}) != cell_hash(before, {"a": "2"})
    (tmp_path / "base.yaml").write_text("seed_everything: 2\n")
    assert first.settings_hash() != before


def test_a_cell_keeps_every_users_result_and_loses_them_when_published(tmp_path: Path) -> None:
    path = stored(tmp_path, "stage1", [1, 0, 1])
    cell = read_cell(path)
    assert cell is not None
    again = results_of(cell)
    assert again.hit1.tolist() == [True, False, True]
    assert again.rank.tolist() == [1.0, 3.0, 1.0]
    assert cell["metrics"]["hit@1"]["value"] == pytest.approx(2 / 3)
    assert "per_user" not in without_users(cell)


def test_ranks_that_a_row_does_not_have_are_missing_in_its_cell_too(tmp_path: Path) -> None:
    cell = read_cell(stored(tmp_path, "popularity", [0, 1, 1], catalogue=False))
    assert cell is not None
    assert np.isnan(results_of(cell).full_rank).all()
    assert results_of(cell).rank.tolist() == [3.0, 1.0, 1.0]


def test_a_torn_cell_counts_as_missing(tmp_path: Path) -> None:
    path = stored(tmp_path, "stage1", [1, 0, 1])
    path.write_text(path.read_text()[:100])
    assert read_cell(path) is None
    assert all_cells(tmp_path) == []


def tables_of(tmp_path: Path) -> tuple[Grid, Any]:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    for domain in ("a", "b"):
        stored(tmp_path, "popularity", [0, 0, 1, 0], domain=domain)
        stored(tmp_path, "popularity", [0, 0, 1, 0], domain=domain, seed=2)
        stored(tmp_path, "stage1", [1, 1, 1, 0], domain=domain)
        stored(tmp_path, "stage1", [1, 0, 1, 0], domain=domain, seed=2)
    return grid, ordered(grid, all_cells(tmp_path))


def test_tables_average_seeds_and_comparisons_pool_domains(tmp_path: Path) -> None:
    grid, tables = tables_of(tmp_path)
    row = summary(tables["p", "a"]["stage1"])
    assert row["hit@1"] == pytest.approx(0.625)
    assert row["hit@1 sd"] == pytest.approx(np.std([0.75, 0.5], ddof=1))
    facts = comparisons(grid, tables)
    assert [fact["domain"] for fact in facts] == ["a", "b", "pooled"]
    assert [fact["difference"] for fact in facts] == pytest.approx([0.375] * 3)
    assert facts[2]["users"] == 8
    assert facts[0]["p_flip"] == pytest.approx(
        0.5
    )  # users that win with 2 and 1 seeds: two of four signs as far from zero
    assert facts[2]["p_flip"] == pytest.approx(0.125)  # two of 16
    assert all(fact["p_holm"] >= fact["p_flip"] for fact in facts)
    text = markdown(grid, tables, facts)
    assert "| Stage1 | 0.625 ± 0.177 |" in text
    assert "| p: pooled | Stage1 − Popularity | +0.375" in text


def test_a_difference_is_shown_for_each_seed_too(tmp_path: Path) -> None:
    """Also pooled, where each domain counts by its users, and where cells were published without their users."""
    grid, _ = tables_of(tmp_path)
    stored(tmp_path, "popularity", [0] * 12, domain="b")
    stored(tmp_path, "popularity", [1] + [0] * 11, domain="b", seed=2)
    stored(tmp_path, "stage1", [1] * 3 + [0] * 9, domain="b")
    stored(tmp_path, "stage1", [0] * 12, domain="b", seed=2)
    tables = ordered(grid, all_cells(tmp_path))
    facts = comparisons(grid, tables)
    public = ordered(grid, [without_users(cell) for cell in all_cells(tmp_path)])
    for known in (tables, public):
        lines = [line for line in markdown(grid, known, facts).splitlines() if "[" in line and "−" in line]
        assert [line.split(" | ")[3] for line in lines] == ["+0.500, +0.250", "+0.250, -0.083", "+0.312, +0.000"]


def test_cells_on_different_candidate_lists_are_not_put_into_one_table(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    stored(tmp_path, "popularity", [0, 1], lists="x")
    stored(tmp_path, "stage1", [0, 1], lists="y")
    with pytest.raises(DataError, match="2 different candidate lists"):
        ordered(grid, all_cells(tmp_path))


def test_published_cells_stay_in_the_table_and_published_comparisons_beside_them(tmp_path: Path) -> None:
    out, public = tmp_path / "out", tmp_path / "public"
    grid_path = grid_file(tmp_path)
    grid = load_grid(grid_path, set(METHODS))
    public.mkdir()
    old = stored(tmp_path, "popularity", [0, 1])
    for seed in (1, 2):
        made = json.loads(stored(tmp_path, "stage1", [1, 1], seed=seed).read_text())
        assert made["settings_hash"]
    kept = cell_path(public, "p", "a", "popularity", 1)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(without_users(json.loads(old.read_text()))))
    new = cell_path(out, "p", "a", "stage1", 1)
    new.parent.mkdir(parents=True)
    new.write_text(cell_path(tmp_path, "p", "a", "stage1", 1).read_text())
    torn = cell_path(out, "p", "a", "popularity", 1)
    torn.parent.mkdir(parents=True)
    torn.write_text("{")  # must not hide the published one
    tables = ordered(grid, all_cells(out, public))
    assert set(tables["p", "a"]) == {"popularity", "stage1"}
    assert summary(tables["p", "a"]["popularity"])["hit@1"] == pytest.approx(0.5)
    assert comparisons(grid, tables) == []
    fact = {"pair": "p", "domain": "a", "a": "stage1", "b": "popularity", "p_flip": 0.25, "p_holm": 1.0, "seeds": 1}
    fact["difference"] = 0.5
    other = {**fact, "b": "sfubm"}  # no comparison of this grid any more
    assert comparisons(grid, tables, [fact, other]) == [{**fact, "p_holm": 0.25}]


def test_a_published_comparison_stays_while_its_cells_are_there(tmp_path: Path) -> None:
    """With more seeds than the users at hand give, and only as long as no cell behind it was replaced."""
    out, public = tmp_path / "out", tmp_path / "public"
    grid = load_grid(grid_file(tmp_path), set(METHODS))

    def put(folder: Path, method: str, hits: list[int], seed: int = 1) -> None:
        cell = json.loads(stored(tmp_path, method, hits, seed=seed).read_text())
        path = cell_path(folder, "p", "a", method, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(without_users(cell) if folder == public else cell))

    for seed, hits in ((1, [1, 1, 1, 0]), (2, [1, 0, 0, 0])):
        put(public, "stage1", hits, seed)
        put(public, "popularity", [0, 0, 1, 0], seed)
    put(out, "stage1", [1, 1, 1, 0])
    put(out, "popularity", [0, 0, 1, 0])
    fact = {"pair": "p", "domain": "a", "a": "stage1", "b": "popularity", "p_flip": 0.25, "p_holm": 1.0, "seeds": 2}
    fact["difference"] = 0.25
    (of_one_seed,) = comparisons(grid, ordered(grid, all_cells(out, public)))
    assert (of_one_seed["seeds"], of_one_seed["difference"]) == (1, pytest.approx(0.5))
    assert comparisons(grid, ordered(grid, all_cells(out, public)), [fact])[0]["seeds"] == 2
    put(out, "stage1", [0, 0, 1, 0])  # computed anew, with another outcome
    (again,) = comparisons(grid, ordered(grid, all_cells(out, public)), [fact])
    assert (again["seeds"], again["difference"]) == (1, 0.0)
    cells = all_cells(tmp_path / "nothing", public)
    assert [f["seeds"] for f in comparisons(grid, ordered(grid, cells), [fact])] == [2]
    assert comparisons(grid, ordered(grid, cells), [{**fact, "difference": 0.3}]) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ('{"a": 1}', "is no list of comparisons"),
        ('[{"a": "x"}]', "is no list of comparisons with a, b, diff"),
    ],
)
def test_a_bad_file_of_published_comparisons_is_named(tmp_path: Path, fit: FakeFit, text: str, words: str) -> None:
    public = tmp_path / "public"
    public.mkdir()
    (public / "comparisons.json").write_text(text)
    arguments = ["--grid", str(grid_file(tmp_path)), "--out", str(tmp_path / "out"), "--publish", str(public)]
    with pytest.raises(DataError, match=rf"comparisons\.json {words}"):
        results([*arguments, "--tables-only"])
    assert [file.name for file in public.iterdir()] == ["comparisons.json"]


@pytest.mark.parametrize("entry", ["pair", "metrics", "slices", "num_candidates", ""])
def test_a_bad_published_cell_is_named_and_one_of_ones_own_is_computed_again(
    tmp_path: Path, fit: FakeFit, entry: str
) -> None:
    path, out, public = grid_file(tmp_path), tmp_path / "out", tmp_path / "public"
    arguments = ["--grid", str(path), "--out", str(out), "--publish", str(public)]
    results(arguments)
    for folder in (out, public):
        file = cell_path(folder, "p", "a", "stage1", 1)
        cell = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in cell.items() if key != entry}) if entry else "{")
    with pytest.raises(
        DataError, match=r"public/cells/p/a/stage1/seed1\.json is no cell of format 1, or not a whole one"
    ):
        results(arguments)
    assert json.loads(cell_path(out, "p", "a", "stage1", 1).read_text())["pair"] == "p"


def test_what_is_published_does_not_take_the_place_of_per_user_results(tmp_path: Path, fit: FakeFit) -> None:
    arguments = ["--grid", str(grid_file(tmp_path)), "--out", str(tmp_path / "out")]
    results(arguments)
    with pytest.raises(ConfigError, match="is the output folder itself, whose per-user results would be lost"):
        results([*arguments, "--tables-only", "--publish", str(tmp_path / "out" / "x" / "..")])
    assert all("per_user" in cell for cell in all_cells(tmp_path / "out"))


def test_cells_of_other_settings_are_left_out_of_the_table(tmp_path: Path) -> None:
    stored(tmp_path, "popularity", [0, 1])
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    assert set(ordered(grid, all_cells(tmp_path))["p", "a"]) == {"popularity"}
    (tmp_path / "base.yaml").write_text("seed_everything: 2\n")
    assert ordered(grid, all_cells(tmp_path)) == {}


def test_finished_cells_are_skipped_and_stale_ones_computed_again(
    tmp_path: Path, fit: FakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    out = tmp_path / "out"
    assert runner.run_grid(grid, out, None, [], None) == []
    assert len(fit.calls) == 3
    assert not any("--ckpt_path" in call for call in fit.calls)
    runner.run_grid(grid, out, None, [], None)
    assert len(fit.calls) == 3
    cell_path(out, "p", "a", "stage1", 2).write_text("{")  # torn
    (out / "runs/p/main/2/results/b/stage1.parquet").unlink()
    (out / "runs/p/main/2/results/a/stage1.parquet").unlink()
    runner.run_grid(grid, out, None, [], None)
    assert len(fit.calls) == 4
    assert fit.calls[-1][-2:] == ["--ckpt_path", "last"]
    monkeypatch.setattr(runner, "sources", lambda *of: {"a": "2", "b": "1"})  # the data changed
    runner.run_grid(grid, out, None, ["p/v/1"], None)
    assert len(fit.calls) == 5
    assert "--ckpt_path" not in fit.calls[-1]


@pytest.mark.parametrize("domain", ["a", "b, all users"])
def test_a_cell_that_is_gone_or_torn_is_made_again_of_the_row_that_is_there(
    tmp_path: Path, fit: FakeFit, domain: str
) -> None:
    grid, out = load_grid(grid_file(tmp_path), set(METHODS)), tmp_path / "out"
    runner.run_grid(grid, out, None, ["p/main/1"], None)
    path = cell_path(out, "p", domain, "stage1", 1)
    whole = path.read_text()
    for spoil in (path.unlink, lambda: path.write_text(whole[:40])):
        spoil()
        assert runner.run_grid(grid, out, None, ["p/main/1"], None) == []
        assert path.read_text() == whole
    assert len(fit.calls) == 1


def test_a_run_that_died_keeps_what_it_had_and_goes_on(tmp_path: Path, fit: FakeFit) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    out, fit.rows_before_death = tmp_path / "out", 1
    assert runner.run_grid(grid, out, None, ["p/main/1"], None) == ["p/main/1"]
    assert {cell["method"] for cell in all_cells(out)} == {"popularity"}
    fit.rows_before_death = None
    assert runner.run_grid(grid, out, None, ["p/main/1"], None) == []
    assert "--ckpt_path" in fit.calls[-1]


def test_a_run_without_federated_rounds_goes_on_too(tmp_path: Path, fit: FakeFit) -> None:
    """It writes no states, and without ``--ckpt_path`` a fit clears what lies in its folder."""
    path = grid_file(tmp_path, runs={"main": {"rows": ["random", "popularity", "encoder"]}}, comparisons=[])
    grid, out = load_grid(path, set(METHODS)), tmp_path / "out"
    fit.rows_before_death = 2
    assert runner.run_grid(grid, out, None, [], None) == ["p/main/1"]
    fit.rows_before_death = None
    assert runner.run_grid(grid, out, None, [], None) == []
    assert fit.computed == ["random", "popularity", "encoder"]


def test_rows_of_a_grid_that_was_killed_are_of_the_code_that_computed_them(
    tmp_path: Path, fit: FakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = load_grid(grid_file(tmp_path), set(METHODS)), tmp_path / "out"
    fit.rows_before_death = 1
    with monkeypatch.context() as killed:
        killed.setattr(runner, "_export", lambda *of: None)
        runner.run_grid(grid, out, None, ["p/main/1"], None)
    fit.rows_before_death = None
    monkeypatch.setattr(runner, "environment", lambda: {"commit": "later", "hardware": {}, "versions": {}})
    assert runner.run_grid(grid, out, None, ["p/main/1"], None) == []
    assert {cell["method"]: cell["commit"] for cell in all_cells(out)} == {"popularity": "c", "stage1": "later"}
    assert fit.computed == ["popularity", "stage1"]


def test_what_is_edited_while_a_run_is_at_work_is_not_what_its_cells_are_of(tmp_path: Path, fit: FakeFit) -> None:
    grid, out = load_grid(grid_file(tmp_path), set(METHODS)), tmp_path / "out"
    fit.while_at_work = lambda: (tmp_path / "base.yaml").write_text("seed_everything: 2\n")
    runner.run_grid(grid, out, None, ["p/main/1"], None)
    assert ordered(grid, all_cells(out)) == {}
    (tmp_path / "base.yaml").write_text("seed_everything: 1\n")
    assert ordered(grid, all_cells(out)).keys() >= {("p", "a"), ("p", "b")}


def test_a_run_is_of_the_domains_that_its_own_configuration_gives(
    tmp_path: Path, fit: FakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.yaml").write_text("data: {init_args: {domains: {a: null}}}\n")
    (tmp_path / "other.yaml").write_text("trainer: {devices: 1}\n")
    one, other = str(tmp_path / "one.yaml"), str(tmp_path / "other.yaml")
    runs: dict[str, Any] = {
        "main": {"rows": ["popularity"]},
        "one": {"rows": {"popularity": "In one domain"}, "config": [other, one]},
        "other": {"rows": {"popularity": "Elsewhere"}, "config": other},
        "flags": {"rows": {"popularity": "By flag"}, "flags": ["--data.root", "x"]},
    }
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(runner, "sources", lambda *of: asked.append(of) or {"a": "1"})
    grid = load_grid(grid_file(tmp_path, runs=runs, comparisons=[]), set(METHODS))
    assert runner.run_grid(grid, tmp_path / "out", None, [], None) == []
    base = tmp_path / "base.yaml"
    assert len(fit.calls) == 4
    assert asked == [((base,), (), None), ((base, Path(one)), (), None), ((base,), ("--data.root", "x"), None)]


def test_tables_print_the_labels_that_the_grid_has_now(tmp_path: Path, fit: FakeFit) -> None:
    grid, out = load_grid(grid_file(tmp_path), set(METHODS)), tmp_path / "out"
    runner.run_grid(grid, out, None, [], None)
    path = grid_file(tmp_path, runs={"v": {"rows": {"stage1": "Renamed"}}}, comparisons=[])
    renamed = load_grid(path, set(METHODS))
    assert runner.run_grid(renamed, out, None, [], None) == []
    assert len(fit.calls) == 3
    tables = ordered(renamed, all_cells(out))
    assert {summary(seeds)["label"] for methods in tables.values() for seeds in methods.values()} == {"Renamed"}


def test_rows_of_other_settings_do_not_pass_for_those_of_a_run_that_died_at_once(
    tmp_path: Path, fit: FakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    out = tmp_path / "out"
    assert runner.run_grid(grid, out, None, ["p/main/1"], None) == []
    monkeypatch.setattr(runner, "sources", lambda *of: {"a": "2", "b": "1"})  # the data changed
    fit.rows_before_death = 0
    assert runner.run_grid(grid, out, None, ["p/main/1"], None) == ["p/main/1"]
    assert not list((out / "runs" / "p" / "main" / "1").rglob("*.parquet"))


def test_no_run_starts_when_the_budget_is_used_up(tmp_path: Path, fit: FakeFit) -> None:
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    assert runner.run_grid(grid, tmp_path / "out", None, [], 0.0) == ["p/main/1", "p/main/2", "p/v/1"]
    assert fit.calls == []


def test_runs_side_by_side_share_the_threads(tmp_path: Path, fit: FakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 6)
    fit.at_work = threading.Barrier(3)  # passed only when three runs are at work at once
    grid = load_grid(grid_file(tmp_path), set(METHODS))
    assert runner.run_grid(grid, tmp_path / "out", None, [], None, jobs=3) == []
    assert (len(fit.calls), fit.threads) == (3, "2")
    assert {cell["hardware"]["threads"] for cell in all_cells(tmp_path / "out")} == {2}
    with pytest.raises(ConfigError, match="--jobs 0"):
        runner.run_grid(grid, tmp_path / "out", None, [], None, jobs=0)


def test_the_command_builds_tables_figures_and_what_may_be_published(
    tmp_path: Path, fit: FakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    path, public = grid_file(tmp_path), tmp_path / "public"
    results(["--grid", str(path), "--out", str(tmp_path / "out"), "--publish", str(public)])
    assert "Paired differences in Hit@1" in capsys.readouterr().out
    assert (public / "plots" / "p_a_hit.png").stat().st_size > 1000
    published = list((public / "cells").rglob("*.json"))
    assert len(published) == 20
    assert len(json.loads((public / "comparisons.json").read_text())) == 6  # two domains and both together, twice
    for file in published:
        cell = json.loads(file.read_text())
        assert "per_user" not in cell
        assert str(tmp_path / "out") not in file.read_text()
        assert cell["command"].startswith("lightning-sfubm fit --config")
    with pytest.raises(SystemExit):
        results(["--grid", str(path), "--out", str(tmp_path / "new"), "--budget", "0"])
