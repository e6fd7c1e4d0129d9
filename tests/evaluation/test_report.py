import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.facts import ledger_facts, result_rows, run_facts
from lightning_sfubm.evaluation.report import build_report, main, render_html
from lightning_sfubm.evaluation.report_plots import figures
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.evaluation.run_folder import RunFolder
from lightning_sfubm.evaluation.terminal import print_results
from lightning_sfubm.federated.ledger import Ledger

from .conftest import METHODS, make_result

DOMAINS = ("action films", "drama films")


class Page(HTMLParser):
    """Text and tags of a document; checks that tags are balanced."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(fake_run):
    return Page(build_report(fake_run).read_text())


@pytest.fixture
def run(fake_run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(fake_run, tmp_path / "run")


def words(page):
    return " ".join(page.text.split())


def page_without_figures(folder):
    return Page(render_html(run_facts(RunFolder.read(folder)), {}))


def test_the_page_is_one_self_contained_file_without_scripts(page):
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            if (
                name in attributes and attributes[name] != "privacy_report.html"
            ):  # written beside it wherever there is a ledger
                assert attributes[name].startswith(("data:image/svg+xml;base64,", "#"))
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links.count("privacy_report.html") == 1
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert anchors == {a["id"] for tag, a in page.tags if tag == "section"}


def test_every_figure_is_there_as_svg_with_an_alternative_text(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    for image in images:
        assert len(image["alt"]) > 20
        assert b"<svg" in base64.b64decode(image["src"].partition(",")[2])


def test_every_method_stands_in_every_table_with_its_numbers(page, fake_run):
    text = words(page)
    for domain in DOMAINS:
        for method, label, *_ in METHODS:
            summary = PerUserResults.load(fake_run / "results" / domain / f"{method}.parquet").summary()
            hit = summary["hit@1"]
            assert f"{label} {hit.value:.3f} [{hit.low:.3f}, {hit.high:.3f}]" in text
    place = text.index("Trained params")
    for _, label, *_ in METHODS:  # in the order of the meta data, not of the file names
        place = text.index(f" {label} 0.", place)


def test_what_must_be_said_is_said(page):
    text = words(page)
    for sentence in (
        "The noise on item vectors is obfuscation, not differential privacy",
        "Chance level of Hit@1 is 1/20 = 0.050",
        "lightning fit --config configs/experiment/demo.yaml",
        "0123abc",
        "SmolLM2-135M-Instruct",
        "an invalid answer is a miss",
        "0.05 (this run)",
        "interactions: read 51234",
        "vectors 900×384 float32",
    ):
        assert sentence in text, sentence
    assert "Undefined" not in text
    assert not re.search(r"\bnan\b|\bNone\b", text)


def test_texts_are_escaped(page):
    assert "note: <b>not bold</b>" in page.text
    assert "b" not in {tag for tag, _ in page.tags}


def test_the_json_holds_the_same_facts(fake_run, page):
    facts = json.loads((fake_run / "report.json").read_text())
    assert [domain["name"] for domain in facts["domains"]] == list(DOMAINS)
    rows = facts["domains"][0]["rows"]
    assert [row["method"] for row in rows] == [method for method, *_ in METHODS]
    zero_shot = next(row for row in rows if row["method"] == "zero_shot")
    assert zero_shot["metrics"]["full_ndcg@10"] == {"value": None, "low": None, "high": None, "n": 0}
    assert zero_shot["metrics"]["valid_ratio"]["value"] < 1
    assert len(facts["comparisons"]) == 8
    assert all(c["p_holm"] >= c["hit@1"]["p_mcnemar"] for c in facts["comparisons"])
    assert facts["communication"]["totals"]["up"] == 2 * (900 * 384 * 4 + 96 + 5 * 402_112)
    assert len(facts["history"]) == 2 * 13


def test_equal_runs_give_equal_bytes(run):
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("run.json", "run.json is missing"),
        ("config.yaml", "config.yaml is missing"),
        ("results", "No results were stored"),
        ("data", "No data cards were stored"),
        ("history.jsonl", "No history was recorded"),
        ("ledger.jsonl", "No federated messages were recorded"),
        ("privacy.json", "No privacy figures were computed"),
    ],
)
def test_a_missing_part_says_so(run, name, sentence):
    part = run / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    text = words(page_without_figures(run))
    assert sentence in text
    assert "not differential privacy" in text


def test_an_empty_folder_is_refused_and_a_run_without_results_has_a_report(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.json").write_text('{"title": "cut short"}')
    page = Page(build_report(tmp_path).read_text())
    assert "No results were stored" in page.text
    assert "img" not in {tag for tag, _ in page.tags}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "run.json"]
    (tmp_path / "run.json").write_text("{")  # broken, which the report says
    assert "run.json: broken JSON" in Page(build_report(tmp_path).read_text()).text


def test_broken_parts_are_named_and_the_rest_is_used(run):
    (run / "privacy.json").write_text('{"action films": [')
    (run / "history.jsonl").write_text((run / "history.jsonl").read_text() + '{"client": "act')
    (run / "data" / "action films.json").write_text("[1]")
    (run / "results" / DOMAINS[0] / "sasrec.json").unlink()
    text = words(page_without_figures(run))
    for sentence in (
        "privacy.json: broken JSON in line 1",
        "history.jsonl: line 27 is not an object with client, metrics",
        "action films.json: expected a JSON object, found list",
        "sasrec.parquet: these results cannot be read",
        "not compared: no results of sasrec",
    ):
        assert sentence in text, sentence
    assert "Late fusion of ID and text" in text


def test_sparse_entries_print_a_dash(run):
    (run / "privacy.json").write_text('{"action films": [{"sigma": 0.1, "cosine_mean": 0.5}]}')
    ledger = Ledger(run / "ledger.jsonl")
    ledger.start()
    ledger.record_bytes("a", "up", "", 0, b"0123456789", {})
    (run / "run.json").write_text('{"timings": {"training": {"wall_s": 2.0}}}')
    text = words(Page(build_report(run).read_text()))
    assert "0.1 0.500 – – –" in text
    assert "1 message: 10 B up" in text


@pytest.mark.parametrize("users", [0, 1])
def test_results_of_nobody_and_of_one_user(tmp_path, users):
    for method in ("a", "b"):
        make_result(method, users=users).save(tmp_path / "results" / "films" / f"{method}.parquet")
    (tmp_path / "run.json").write_text('{"comparisons": [{"a": "a", "b": "b"}]}')
    text = words(Page(build_report(tmp_path).read_text()))
    assert "Paired differences" in text
    assert not re.search(r"\bnan\b", text)
    console = Console(record=True, width=120)
    print_results(tmp_path, console)
    assert ("no user in common" in console.export_text()) == (users == 0)


def test_results_on_different_lists_are_not_compared(tmp_path):
    make_result("a").save(tmp_path / "results" / "films" / "a.parquet")
    make_result("b", candidate_hash="deadbeef").save(tmp_path / "results" / "films" / "b.parquet")
    (tmp_path / "run.json").write_text('{"reference_method": "b"}')
    text = words(page_without_figures(tmp_path))
    assert "not compared: results of 'a' and 'b' cannot be compared: candidate_hash is 'c0ffee12'" in text
    assert "2 different candidate lists" in text


def test_without_comparisons_every_method_meets_the_reference(run):
    facts = json.loads((run / "run.json").read_text())
    del facts["comparisons"]
    (run / "run.json").write_text(json.dumps(facts))
    pairs = [(c["domain"], c["a"], c["b"]) for c in run_facts(RunFolder.read(run))["comparisons"]]
    assert pairs == [(d, m, "sasrec") for d in DOMAINS for m, *_ in METHODS if m != "sasrec"]


def test_a_comparison_can_be_meant_for_one_domain(run):
    (run / "run.json").write_text(json.dumps({"comparisons": [{"domain": DOMAINS[1], "a": "sfubm", "b": "stage1"}]}))
    (comparison,) = run_facts(RunFolder.read(run))["comparisons"]
    assert comparison["domain"] == DOMAINS[1]
    assert comparison["p_holm"] == comparison["hit@1"]["p_mcnemar"]


def test_a_further_table_of_a_domain_may_hold_fewer_methods(run):
    for method in ("sfubm", "sasrec"):
        make_result(method, "drama films").save(run / "results" / "drama films, all users" / f"{method}.parquet")
    facts = run_facts(RunFolder.read(run))
    assert [domain["name"] for domain in facts["domains"]] == [*DOMAINS, "drama films, all users"]
    pairs = [(c["a"], c["b"]) for c in facts["comparisons"] if c["domain"] == "drama films, all users"]
    assert pairs == [("sfubm", "sasrec")]
    panels = figures(facts)["hit"].axes
    assert panels[2].get_title(loc="left") == "drama films, all users"
    assert not panels[3].axison


def test_hit_plot_shows_the_values_and_chance(fake_run):
    facts = run_facts(RunFolder.read(fake_run))
    panels = figures(facts)["hit"].axes
    assert [panel.get_title(loc="left") for panel in panels] == list(DOMAINS)
    for panel, domain in zip(panels, facts["domains"]):
        points = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"]
        assert points == [row["metrics"]["hit@1"]["value"] for row in domain["rows"]]
        assert any(list(line.get_xdata()) == [0.05, 0.05] for line in panel.lines)
        assert panel.get_xlabel() == "Hit@1 among 20 candidates"


def test_privacy_plots_are_in_percent_and_mark_the_sigma_of_the_run(fake_run):
    drawn = figures(run_facts(RunFolder.read(fake_run)))
    panel = drawn["linkage"].axes[0]
    assert panel.get_ylabel() == "items linked by the attacker (%)"
    lines = {line.get_label(): line for line in panel.lines}
    assert max(lines["nearest catalogue vector"].get_ydata()) == 100
    assert list(lines["σ of this run"].get_xdata()) == [0.05, 0.05]
    assert lines["chance"].get_ydata()[0] == pytest.approx(100 / 900)


def test_ledger_facts_sum_per_client_direction_and_kind():
    line = {"client": "a", "kind": "teacher", "bytes": 10, "tensors": {"w": {"shape": [2, 3], "dtype": "float32"}}}
    ledger = [
        line | {"direction": "down", "round": 1},
        line | {"direction": "up", "round": 2, "mechanism": {"mechanism": "noise", "sigma": 0.1}},
        line | {"direction": "up", "round": 1, "mechanism": {"mechanism": "noise", "sigma": 0.1}},
    ]
    facts = ledger_facts(ledger)
    up, down = facts["rows"]
    assert (up["direction"], up["messages"], up["bytes"], up["rounds"]) == ("up", 2, 20, [1, 2])
    assert up["tensors"] == ["w 2×3 float32"]
    assert up["mechanisms"] == ["noise, sigma 0.1"]
    assert down["mechanisms"] == []
    assert facts["totals"] == {"up": 20, "down": 10}


def test_what_was_sent_again_is_told_and_counts_once():
    line = {"client": "a", "kind": "teacher", "bytes": 10, "direction": "up", "round": 1}
    facts = ledger_facts([line, line | {"resent": True}, line | {"round": 2}, line | {"round": 2, "resent": True}])
    (row,) = facts["rows"]
    assert (row["messages"], row["bytes"], row["rounds"]) == (2, 20, [1, 2])
    assert (facts["totals"], facts["messages"], facts["resent"]) == ({"up": 20, "down": 0}, 2, 2)


def test_a_guarantee_is_told_as_it_stands_at_the_last_message():
    def spent(epsilon, delta=1e-5):
        privacy = {"mechanism": "DP-SGD over users", "epsilon": epsilon, "delta": delta, "steps": int(epsilon * 10)}
        return {"differential privacy": privacy, "secure aggregation": "threshold 0.6"}

    line = {"client": "a", "kind": "teacher", "bytes": 10, "direction": "up"}
    ledger = [line | {"round": number, "mechanism": spent(epsilon)} for number, epsilon in ((1, 1.23456), (2, 2.0))]
    (row,) = ledger_facts(ledger)["rows"]
    words = (
        "differential privacy: DP-SGD over users, epsilon 2 at delta 1e-05, steps 20, secure aggregation threshold 0.6"
    )
    assert row["mechanisms"] == [words]
    (row,) = ledger_facts([*ledger, line | {"round": 3, "mechanism": spent(3.0, delta=1e-6)}])["rows"]
    assert row["mechanisms"] == [words, words.replace("2 at delta 1e-05, steps 20", "3 at delta 1e-06, steps 30")]


def test_result_rows_are_flat_and_free_of_nan(fake_run):
    rows = result_rows(RunFolder.read(fake_run).results[DOMAINS[0]])
    assert [row["method"] for row in rows] == [method for method, *_ in METHODS]
    assert rows[7]["full_ndcg@10"] is None
    assert rows[0]["hit@1_low"] <= rows[0]["hit@1"] <= rows[0]["hit@1_high"]
    json.dumps(rows, allow_nan=False)


def test_terminal_table(fake_run):
    console = Console(record=True, width=120)
    print_results(fake_run, console)
    text = console.export_text()
    hit = PerUserResults.load(fake_run / "results" / DOMAINS[0] / "sfubm.parquet").summary()["hit@1"]
    assert f"{hit.value:.3f} {hit.low:.3f} to {hit.high:.3f}" in text
    assert "20 candidates, chance: Hit@1 0.050" in text
    assert "beside Hit@1: its 95 % interval" in " ".join(text.split())
    assert "action films: SF-UBM - SASRec +" in text


def test_terminal_table_of_an_empty_run(tmp_path):
    console = Console(record=True)
    print_results(tmp_path, console)
    assert "No results were stored" in console.export_text()


def test_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(DataError, match="there is no such run folder"):
        build_report(tmp_path / "nowhere")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "there is no such run folder" in capsys.readouterr().err


def test_the_module_is_a_command(run):
    command = [sys.executable, "-m", "lightning_sfubm.evaluation.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str(run / "report.html")
