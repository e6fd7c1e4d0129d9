import json

import numpy as np
import pytest
import torch

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.metrics import HitGivenValid, ValidRatio, ranking_metrics
from lightning_sfubm.evaluation.results import COLUMNS, METRICS, PerUserResults, chance

from .conftest import make_result


def test_save_and_load_give_the_same_result(tmp_path):
    result = make_result(full=False, answers=True, label="SASRec", order=3, extra={"train_cpu_s": 1.5})
    path = result.save(tmp_path / "deep" / "sasrec.parquet")
    assert path.stat().st_mode & 0o777 == 0o600  # what each user took
    loaded = PerUserResults.load(path)
    assert loaded.meta == result.meta
    for name, dtype in COLUMNS.items():
        assert getattr(loaded, name).dtype == dtype
        assert np.array_equal(getattr(loaded, name), getattr(result, name), equal_nan=name == "full_rank")
    assert sorted(p.name for p in path.parent.iterdir()) == ["sasrec.json", "sasrec.parquet"]


def test_torn_or_foreign_files_are_refused(tmp_path):
    path = make_result().save(tmp_path / "a.parquet")
    side = path.with_suffix(".json")
    original, table = side.read_text(), path.read_bytes()

    def refused(match):
        with pytest.raises(DataError, match=match) as caught:
            PerUserResults.load(path)
        assert "a." in str(caught.value)

    path.write_bytes(table[:-20])
    refused("cannot be read")
    make_result("other").save(tmp_path / "b.parquet")
    path.write_bytes((tmp_path / "b.parquet").read_bytes())
    refused("do not belong together")
    path.write_bytes(table)
    side.write_text(original[:40])
    refused("cannot be read")
    side.write_text(json.dumps(json.loads(original) | {"format": 99}))
    refused("format 1")
    side.write_text(json.dumps({k: v for k, v in json.loads(original).items() if k != "candidate_hash"}))
    refused("candidate_hash")
    side.unlink()
    refused("cannot be read")
    with pytest.raises(DataError, match=r"stored as \.parquet"):
        make_result().save(tmp_path / "a.csv")


def test_columns_are_checked():
    columns = {name: getattr(make_result(users=3), name) for name in COLUMNS}
    meta = make_result(users=3).meta
    for name, bad, match in (
        ("rank", np.ones(4), r"'rank' has shape \(4,\), expected \(3,\)"),
        ("user", np.array([1, 2, 1]), "more than once"),
        ("rank", np.array([1, 0, 2]), "below 1"),
        ("rank", np.array([1, np.nan, 2]), "NaN"),
    ):
        with pytest.raises(DataError, match=match):
            PerUserResults(meta, **columns | {name: bad})
    with pytest.raises(DataError, match="invalid answer is marked as a hit"):
        PerUserResults(meta, **columns | {"hit1": np.ones(3, bool), "valid": np.zeros(3, bool)})


def test_summary_equals_the_torch_metrics():
    result = make_result(answers=True)
    summary = result.summary()
    ranks = ranking_metrics("", hits=(1,), ndcgs=(5, 10))
    ranks.update(torch.from_numpy(result.rank))
    full = ranking_metrics("full_", hits=(10, 20), ndcgs=(10, 20))
    full.update(torch.from_numpy(result.full_rank))
    given_valid, ratio = HitGivenValid(), ValidRatio()
    for metric in (given_valid, ratio):
        metric.update(torch.from_numpy(result.hit1), torch.from_numpy(result.valid))
    expected = {
        "hit@1_by_score": ranks["hit@1"],
        "ndcg@5": ranks["ndcg@5"],
        "ndcg@10": ranks["ndcg@10"],
        "mrr": ranks["mrr"],
        "hit@1|valid": given_valid,
        "valid_ratio": ratio,
        "full_hr@10": full["hit@10"],
        "full_hr@20": full["hit@20"],
        "full_ndcg@10": full["ndcg@10"],
        "full_ndcg@20": full["ndcg@20"],
    }
    for name, metric in expected.items():
        assert summary[name].value == pytest.approx(metric.compute().item(), abs=1e-6), name
    assert summary["hit@1"].value == pytest.approx(result.hit1.mean())
    assert summary["hit@1"].value == pytest.approx(summary["hit@1|valid"].value * summary["valid_ratio"].value)
    assert set(summary) == set(METRICS)
    for name, (value, low, high, n) in summary.items():
        assert low <= value <= high, name
        assert 0 < n <= 400


def test_an_empty_result_has_no_values_and_survives_storage(tmp_path):
    result = make_result(users=0)
    assert all(estimate.n == 0 and np.isnan(estimate.value) for estimate in result.summary().values())
    assert len(PerUserResults.load(result.save(tmp_path / "empty.parquet"))) == 0


def test_a_single_user():
    summary = make_result(users=1).summary()
    assert summary["hit@1"].value in (0.0, 1.0)
    assert summary["hit@1"].high - summary["hit@1"].low > 0.5  # one user says little
    assert summary["mrr"].n == 1


def test_all_answers_invalid():
    result = make_result(answers=True)
    result.valid[:] = False
    result.hit1[:] = False
    summary = result.summary()
    assert (summary["hit@1"].value, summary["valid_ratio"].value) == (0.0, 0.0)
    assert summary["hit@1"].n == 400
    assert summary["hit@1|valid"].n == 0
    assert np.isnan(summary["hit@1|valid"].value)


def test_a_method_without_catalogue_scores_has_no_full_metrics():
    summary = make_result(full=False).summary()
    assert all(summary[name].n == 0 for name in METRICS if name.startswith("full_"))
    assert summary["ndcg@10"].n == 400


def test_slices_follow_their_definitions():
    result = make_result()
    slices = result.slices()
    assert (slices["cold target"].target_train_count <= 4).all()
    assert len(slices["cold target"]) == (result.target_train_count < 5).sum() > 0
    assert slices["short history"].history_length.max() == 5
    assert slices["long history"].history_length.min() == 6
    assert len(slices["short history"]) + len(slices["long history"]) == len(result)


def test_unknown_metric_is_named():
    with pytest.raises(DataError, match="unknown metric 'recall'"):
        make_result().per_user("recall")


def test_chance_levels_equal_those_of_random_ranks():
    ranks = np.random.default_rng(0).integers(1, 21, 200_000)
    assert chance("hit@1", 20) == pytest.approx(0.05)
    assert chance("ndcg@10", 20) == pytest.approx(((ranks <= 10) / np.log2(1 + ranks)).mean(), abs=0.003)
    assert chance("mrr", 20) == pytest.approx((1 / ranks).mean(), abs=0.003)
    assert chance("full_hr@10", 20) is None
    assert chance("hit@1", 0) is None
