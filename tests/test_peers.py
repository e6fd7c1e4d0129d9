"""The benchmark against peers: export, budget, ranked lists and report; the peers' own libraries are not needed here."""

import csv
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import SyntheticReader
from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.evaluate import evaluate_ranker

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"
FOREIGN = {
    "run_recbole": ["config", "data", "data.dataloader", "data.interaction", "trainer", "utils"],
    "run_replay": ["data", "data.nn", "nn.lightning", "nn.lightning.optimizer", "nn.sequential", "nn.transform",
                   "nn.transform.template"],
    "run_rectools": ["dataset", "models"],
}  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of the benchmark; libraries it needs and that are not installed are replaced by dummies."""
    monkeypatch.syspath_prepend(str(PEERS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("harness", "export", "report", "interleave", "run_ours", *FOREIGN):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str) -> ModuleType:
        package = name.removeprefix("run_")
        for part in FOREIGN.get(name, []):
            for module in (package, f"{package}.{part}"):
                monkeypatch.setitem(sys.modules, module, MagicMock())
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)  # the scripts set one


@pytest.fixture
def run(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a script with arguments, as from a shell."""

    def call(name: str, *arguments: object) -> None:
        module = script(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()

    return call


@pytest.fixture
def export(run: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An export of a small generated shop, read back."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    raw = SyntheticReader(num_users=120, num_items=60, mean_length=9, order=0.95).read(None)
    folder = tmp_path / "data" / "shop"
    folder.mkdir(parents=True)
    for name, table, names in (
        ("interactions", raw.interactions, ["user_id", "item_id", "pos"]),
        ("items", raw.items, ["item_id", "title"]),
    ):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(zip(*table.to_pydict().values(), strict=True))
    run("export", "--data-root", tmp_path / "data", "--folder", "shop", "--out", tmp_path / "export", "--k-core", 0)
    return script("harness").Export.load(tmp_path / "export")


def opened(script: Any, export: Any) -> DomainDataModule:
    data: DomainDataModule = script("export").open_data(export.meta)
    return data


def test_export_holds_the_split_and_no_target(script: Any, export: Any) -> None:
    data = opened(script, export)
    domain, splits = data.domain, data.splits
    assert len(export.train) == domain.num_users == 120
    for user in range(domain.num_users):
        expected = domain.items[splits.train_start[user] : splits.train_end[user]]
        assert (export.train.items[export.train.offsets[user] : export.train.offsets[user + 1]] == expected).all()
    for split, targets in (("val", splits.val), ("test", splits.test)):
        histories = export.queries[split]
        for row, user in enumerate(splits.eval_users):
            known = domain.items[domain.offsets[user] : targets[row]]
            assert (histories.items[histories.offsets[row] : histories.offsets[row + 1]] == known).all()
    padded = export.train.padded(np.array([3, 5]), 4).numpy()
    own = domain.items[splits.train_start[3] : splits.train_end[3]][-4:]
    assert (padded[0] == np.concatenate([np.zeros(4 - len(own), int), own])).all()


def test_generated_users_are_exported_without_a_folder(
    script: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    run("export", "--reader", "synthetic", "--items", 50, "--k-core", 0, "--max-users", 100, "--out", tmp_path / "made")
    export = script("harness").Export.load(tmp_path / "made")
    assert (export.num_items, len(export.train)) == (50, 100)
    assert opened(script, export).name == "synthetic-50"
    with pytest.raises(SystemExit):
        run("export", "--out", tmp_path / "other")
    assert "--data-root" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="CPU seconds are read from /proc")
def test_runs_take_turns(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two runs prints between the lines of the other; one that fails is told by its code."""
    busy = (
        "import time\nfor number in range(3):\n    until = time.process_time() + 0.3\n"
        "    while time.process_time() < until: pass\n    print(time.monotonic(), flush=True)"
    )
    commands = [
        [sys.executable, "-c", busy],
        [sys.executable, "-c", busy],
        [sys.executable, "-c", "raise SystemExit(3)"],
    ]
    assert script("interleave").interleave(commands, 0.2, tmp_path / "log") == [0, 0, 3]
    first, second = (list(map(float, (tmp_path / "log" / f"{n}.log").read_text().split())) for n in (0, 1))
    assert len(first) == len(second) == 3
    assert first[0] < second[-1]
    assert second[0] < first[-1]

    started, plain = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **named: started.append(plain(*given, **named)) or started[-1]
    )
    with pytest.raises(FileNotFoundError):
        script("interleave").interleave(
            [[sys.executable, "-c", "import time; time.sleep(600)"], ["none"]], 0.2, tmp_path
        )
    assert [process.poll() for process in started] == [-signal.SIGKILL]  # not left behind, held


def test_lists_give_the_metrics_of_the_full_scores(script: Any, export: Any, tmp_path: Path) -> None:
    harness, report = script("harness"), script("report")
    data = opened(script, export)
    table = torch.randn(data.num_items + 1, 8, generator=torch.Generator().manual_seed(0))
    table[0], table[7] = 0.0, table[9]  # a tie

    class Mean:
        def score_all(self, batch: Any) -> torch.Tensor:
            return scores(batch["history"])

        def rank(self, batch: Any) -> torch.Tensor:
            return self.score_all(batch).gather(1, batch["candidates"])

    def scores(histories: torch.Tensor) -> torch.Tensor:
        return table[histories].sum(1) @ table.T

    def ranks(ranker: Any) -> np.ndarray:
        batches: Any = data.rank_dataloader("test", 64, with_seen=True)
        result = evaluate_ranker(ranker, batches, catalogue=data.catalogue, method="m", domain="shop", split="test",
                                 seed=1, candidate_hash="x", progress=False)  # fmt: skip
        return result.full_rank[result.user.argsort()]

    histories = export.queries["test"]
    lists = harness.ranked_lists(scores, histories, data.num_items, max_length=50, batch=50)
    np.savez(tmp_path / "lists.npz", **lists)
    users = data.splits.eval_users
    stored = report.StoredLists(tmp_path / "lists.npz", users, histories.lengths, data.num_items)
    full, listed = ranks(Mean()), ranks(stored)
    top = full <= harness.KEEP
    assert 20 < top.sum() < len(full)
    assert (listed[top] == full[top]).all()
    assert (listed[~top] > harness.KEEP).all()

    short = {**lists, "offsets": np.arange(len(users) + 1)}
    np.savez(tmp_path / "short.npz", **short)
    with pytest.raises(DataError, match="not one list of history length"):
        report.StoredLists(tmp_path / "short.npz", users, histories.lengths, data.num_items)
    with pytest.raises(ValueError, match="NaN among them"):
        harness.ranked_lists(lambda h: torch.full((len(h), data.num_items + 1), torch.nan), histories, 60, 50)


def test_the_clock_stands_still_while_lists_are_written(
    script: Any, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = script("harness")
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(harness, "time", SimpleNamespace(process_time=lambda: clock.now))
    recorder = harness.Recorder(export, tmp_path / "run", [2.0, 5.0, 6.0], 50, {"library": "x"})
    module = torch.nn.Dropout()

    def score(histories: torch.Tensor) -> torch.Tensor:
        assert not module.training
        clock.now += 50.0
        return torch.zeros(len(histories), export.num_items + 1)

    recorder.start(steps_per_epoch=4)
    done = []
    for _ in range(6):
        clock.now += 1.0
        done.append(recorder.step(module, score, epoch=0))
        if len(done) == 3:
            clock.now += 3.5  # a long step passes two stages: one snapshot
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [(s["cpu_s"], s["steps"]) for s in facts["snapshots"]] == [(2.0, 2), (7.5, 4)]
    assert done == [False, False, False, True, True, True]
    assert module.training
    assert facts["fingerprint"] == export.meta["fingerprint"]
    assert facts["steps_per_epoch"] == 4


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_ours_end_to_end(run: Any, export: Any, tmp_path: Path, model: str) -> None:
    """The last snapshot knows the planted chain, the first does not; a run on other data is refused."""
    runs, results = tmp_path / "runs", tmp_path / "peers.json"
    where = ["--export", tmp_path / "export", "--out", runs]
    settings = ["--hidden", 16, "--batch-size", 32, "--lr", 0.01, "--dropout", 0.1]
    run("run_ours", *where, "--model", model, "--budget", "0.001,2.0", *settings)
    run("report", *where, "--results", results)
    result = json.loads(results.read_text())
    (entry,) = result["runs"]
    first, last = entry["snapshots"]
    assert entry["library"] == "ours"
    assert entry["model"] == model
    assert first["steps"] == 1
    assert last["val"]["full_ndcg@10"] > 0.35 > first["val"]["full_ndcg@10"]
    assert entry["chosen"] == last
    assert entry["steps_per_epoch"] == 4  # 120 users in batches of 32
    assert result["comparison"] == {model: {}}
    assert str(tmp_path) not in results.read_text()

    path = next(runs.glob("*/run.json"))
    path.write_text(path.read_text().replace(export.meta["fingerprint"], "0" * 64))
    with pytest.raises(DataError, match="other data than the export"):
        run("report", *where, "--results", results)


def test_comparison_chooses_on_validation_within_the_budget(script: Any) -> None:
    report = script("report")

    def made(library: str, *points: tuple[float, float, float]) -> dict[str, Any]:
        snapshots = [
            {"cpu_s": s, "steps": int(s), "val": {report.CHOICE: v}, "test": {report.CHOICE: t}} for s, v, t in points
        ]
        settings = {"lr": points[0][1]}
        return {"library": library, "model": "sasrec", "budget": "60,120,240", "steps_per_epoch": 30,
                "settings": settings, "snapshots": snapshots}  # fmt: skip

    runs = [
        made("ours", (60.3, 0.30, 0.26), (121, 0.40, 0.33)),
        made("a", (61, 0.10, 0.10), (123, 0.20, 0.50)),  # best on test, not on validation
        made("a", (60, 0.20, 0.20), (125, 0.30, 0.30)),
        made("a", (60, 0.26, 0.40)),  # stopped early
        made("b", (130, 0.25, 0.99), (241, 0.10, 0.10)),  # its first step passed two stages
    ]
    found = report.at_budgets(runs)["sasrec"]
    assert sorted(found) == [60, 120, 240]
    assert {name: (best["val"][report.CHOICE], best["tried"]) for name, best in found[60].items()} == {
        "ours": (0.30, 1),
        "a": (0.26, 3),
    }
    assert {name: (best["test"][report.CHOICE], best["tried"]) for name, best in found[120].items()} == {
        "ours": (0.33, 1),
        "a": (0.30, 2),
        "b": (0.99, 1),
    }
    assert found[120]["a"]["epochs"] == pytest.approx(125 / 30)
    assert found[240]["b"]["val"][report.CHOICE] == 0.25  # the best within the budget, not the last
    compared = report.compare(found)
    assert list(compared) == ["60", "120", "240"]
    assert compared["60"] == {
        "best_peer": "a",
        "ours_spent": 60,
        "test_ratio": pytest.approx(0.65),
        "budget_to_98_percent_of_best_peer": 60,
    }
    assert compared["120"]["test_ratio"] == pytest.approx(1.1)
    assert compared["120"]["budget_to_98_percent_of_best_peer"] == 60
    assert compared["240"]["ours_spent"] == 120  # ours went no further
    assert compared["240"]["test_ratio"] == pytest.approx(0.33 / 0.99)


def test_recbole_files_and_scores(script: Any, export: Any, tmp_path: Path) -> None:
    recbole = script("run_recbole")
    recbole.write_atomic_files(export, tmp_path / "atomic")
    head, *rows = (tmp_path / "atomic" / "export.inter").read_text().splitlines()
    assert head == "user_id:token\titem_id:token\ttimestamp:float"
    assert len(rows) == len(export.train.items)
    assert rows[0] == f"u0\t{export.train.items[0]}\t0"
    assert rows[export.train.offsets[1]].startswith("u1\t")
    items = (tmp_path / "atomic" / "export.item").read_text().splitlines()
    assert items == ["item_id:token", *map(str, range(1, export.num_items + 1))]

    recbole.Interaction = dict
    to_recbole = torch.tensor([0, 3, 1, 2])  # our item 1 is RecBole's 3

    def predict(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert batch["seq"].tolist() == [[2, 3, 0], [1, 2, 3]]
        assert batch["len"].tolist() == [2, 3]
        return torch.tensor([[0.0, 10.0, 20.0, 30.0]] * 2)

    model = SimpleNamespace(ITEM_SEQ="seq", ITEM_SEQ_LEN="len", full_sort_predict=predict)
    scores = recbole.make_score(model, to_recbole)(torch.tensor([[0, 3, 1], [2, 3, 1]]))
    assert scores.tolist() == [[0.0, 30.0, 10.0, 20.0]] * 2


def test_replay_and_rectools_formats(script: Any, export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = script("run_replay").to_replay(torch.tensor([[0, 3, 1]]), 60, [])
    assert batch["item_id"].tolist() == [[60, 2, 0]]
    assert batch["item_id_mask"].tolist() == [[False, True, True]]

    pytest.importorskip("pandas")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", MagicMock())
    rectools = script("run_rectools")
    rectools.Columns = SimpleNamespace(User="user_id", Item="item_id", Weight="weight", Datetime="datetime")
    table = rectools.interactions(export)
    grouped = table.sort_values("datetime", kind="stable").groupby("user_id")["item_id"].agg(list)
    for user in range(len(export.train)):
        own = export.train.items[export.train.offsets[user] : export.train.offsets[user + 1]].tolist()
        assert grouped.get(user, []) == own
