"""A plausible run folder, made up: two domains, nine methods, five rounds."""

import json

import numpy as np
import pytest

from lightning_sfubm.evaluation.results import PerUserResults, ResultMeta
from lightning_sfubm.seeds import numpy_generator

CANDIDATES, ITEMS = 20, 900

#: method, label, group, strength, scores the catalogue, answers in words
METHODS = (
    ("random", "Random", "reference", 0.0, True, False),
    ("popularity", "Popularity", "reference", 0.8, True, False),
    ("sasrec", "SASRec", "one domain", 1.5, True, False),
    ("id_text", "ID + text, one encoder", "controls without an LLM", 1.8, True, False),
    ("late_fusion", "Late fusion of ID and text", "controls without an LLM", 1.85, False, False),
    ("stage1_local", "Stage 1 without federation", "ours", 1.9, True, False),
    ("stage1", "SF-UBM stage 1", "ours", 1.95, True, False),
    ("zero_shot", "LLM, zero-shot", "LLM", 0.6, False, True),
    ("text_lora", "LLM, text only, LoRA", "LLM", 1.4, False, True),
    ("sfubm", "SF-UBM", "ours with an LLM", 2.05, False, False),
)


def make_result(method="sasrec", domain="films", *, users=400, strength=1.5, seed=7, full=True, answers=False, **meta):
    """Gaussian scores with the target's mean shifted by ``strength``; the same users and targets for every method."""
    shared = numpy_generator(seed, "users", domain)
    target, counts = shared.integers(1, ITEMS + 1, users), shared.geometric(0.08, users) - 1
    length, ease = 3 + shared.geometric(0.12, users), shared.normal(0, 1, users)
    own = numpy_generator(seed, domain, method)
    lead = strength * (1 + 0.3 * ease - 0.4 * (counts < 5)) + own.normal(0, 1, users)
    rank = 1 + (own.normal(0, 1, (users, CANDIDATES - 1)) > lead[:, None]).sum(axis=1)
    full_rank = np.minimum(ITEMS, 1 + (rank - 1) * 40 + own.integers(0, 40, users))
    valid = own.random(users) < 0.93 if answers else np.ones(users, bool)
    settings = {"candidate_hash": "c0ffee12", "num_candidates": CANDIDATES, "num_items": ITEMS, "split": "test"} | meta
    return PerUserResults(
        ResultMeta(method=method, domain=domain, seed=seed, **settings),
        user=np.arange(users),
        target=target,
        hit1=(rank == 1) & valid,
        rank=rank,
        valid=valid,
        full_rank=full_rank if full else np.full(users, np.nan),
        history_length=length,
        target_train_count=counts,
    )


def make_run(path, users=800, domains=("action films", "drama films")):
    """Write the run folder into ``path``."""
    for d, domain in enumerate(domains):
        for order, (method, label, group, strength, full, answers) in enumerate(METHODS):
            make_result(
                method,
                domain,
                users=users - 60 * d,
                strength=strength * (1 + 0.1 * d),
                full=full,
                answers=answers,
                label=label,
                group=group,
                order=order,
                cpu_s=0.4 + 11 * (group == "LLM"),
                trainable_params=None if method == "random" else 57_600 * order,
                extra={"train_cpu_s": 40.0 * order},
            ).save(path / "results" / domain / f"{method}.parquet")
        card = {
            "users": users,
            "items": ITEMS,
            "interactions": {"read": 51_234, "kept": 48_901},
            "density": 0.0543,
            "text_fields": ["title", "genres", "year"],
            "truncated_texts": 12,
            "k_core": 5,
        }
        (path / "data").mkdir(exist_ok=True)
        (path / "data" / f"{domain}.json").write_text(json.dumps(card))
    _history(path, domains)
    _ledger(path, domains)
    _privacy(path, domains)
    (path / "config.yaml").write_text("seed_everything: 7\ntrainer:\n  rounds: 5\n  note: <b>not bold</b>\n")
    run = {
        "title": "SF-UBM on two film services",
        "command": "lightning fit --config configs/experiment/demo.yaml",
        "versions": {"lightning-sfubm": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6"},
        "hardware": {"cpu": "2 cores", "memory": "24 GiB", "gpu": None},
        "commit": "0123abc",
        "seed": 7,
        "started": "2026-11-23 10:00",
        "finished": "2026-11-23 10:14",
        "timings": {
            "set-up": {"wall_s": 21.5, "cpu_s": 20.0},
            "text encoding": {"wall_s": 11.0, "cpu_s": 20.9},
            "federated rounds": {"wall_s": 118.0, "cpu_s": 110.2},
            "local training": {"wall_s": 64.5, "cpu_s": 63.0},
            "LLM tuning": {"wall_s": 344.0, "cpu_s": 642.0},
            "evaluation": {"wall_s": 190.0, "cpu_s": 340.0},
        },
        "domains": list(domains),
        "reference_method": "sasrec",
        "comparisons": [{"a": "sfubm", "b": b} for b in ("sasrec", "stage1", "late_fusion", "zero_shot")],
        "notes": ["MovieLens-100K cut into two services by genre group; the cut is ours."],
        "llm": {"model": "SmolLM2-135M-Instruct", "lora_rank": 8},
        "protocol": {"split": "leave-one-out by time", "negatives": "uniform outside the complete history"},
    }
    (path / "run.json").write_text(json.dumps(run))
    return path


def _history(path, domains):
    lines = []
    for d, domain in enumerate(domains):
        level, rounds = 0.36, [(r, 1, "teacher") for r in range(1, 6)]
        for epoch, (round_, within, phase) in enumerate(rounds + [(None, e, "student") for e in range(1, 9)]):
            level += (0.55 + 0.03 * d - level) * 0.3
            loss = 6.8 * 0.9**epoch
            metrics = {
                "val/ndcg@10": level,
                "val/hit@1": level - 0.2,
                "train/loss": loss,
                "train/rec": loss - 0.5,
                "train/fact": 0.2 * 0.9**epoch,
                "train/counter": 0.9 * 0.8**epoch,
                "train/align": 1.1 * 0.95**epoch,
            }
            lines.append({"client": domain, "phase": phase, "round": round_, "epoch": within, "metrics": metrics})
    (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _ledger(path, domains):
    lines = []
    for round_ in range(1, 6):
        for domain in domains:
            for direction in ("up", "down"):
                semantics = {"vectors": {"shape": [ITEMS, 384], "dtype": "float32"}}
                mechanism = {"mechanism": "Gaussian perturbation (heuristic obfuscation)", "sigma": 0.05}
                if round_ == 1:
                    lines.append(
                        {
                            "round": 1,
                            "client": domain,
                            "direction": direction,
                            "kind": "semantics",
                            "bytes": ITEMS * 384 * 4 + 96,
                            "tensors": semantics,
                            "sha256": "ab" * 32,
                            "mechanism": mechanism if direction == "up" else {},
                        }
                    )
                lines.append(
                    {
                        "round": round_,
                        "client": domain,
                        "direction": direction,
                        "kind": "teacher",
                        "bytes": 402_112,
                        "sha256": "cd" * 32,
                        "mechanism": {},
                        "tensors": {f"layer.{i}.weight": {"shape": [64, 64], "dtype": "float32"} for i in range(8)},
                    }
                )
    whole = {"content_sha256": "ef" * 32, "previous": "0" * 64}
    (path / "ledger.jsonl").write_text("".join(json.dumps(line | whole, sort_keys=True) + "\n" for line in lines))


def _privacy(path, domains):
    privacy = {}
    for domain in domains:
        privacy[domain] = []
        for sigma in (0.0, 0.01, 0.05, 0.1, 0.2):
            cosine = float(1 / np.sqrt(1 + 384 * sigma**2))
            linked = float(np.clip(1.15 - 4 * sigma * sigma / 0.04 * 0.5, 0.05, 1.0))
            privacy[domain].append(
                {
                    "sigma": sigma,
                    "dim": 384,
                    "cosine_mean": cosine,
                    "cosine_min": cosine - 0.6 * sigma,
                    "cosine_max": min(1.0, cosine + 0.6 * sigma),
                    "expected_cosine": cosine,
                    "global_cosine_mean": 0.6 * cosine,
                    "obfuscation": 1 - cosine,
                    "linkage_with_replacement": linked,
                    "linkage_without_replacement": min(1.0, linked * 1.1),
                    "averaging": {
                        "uploads": [1, 2, 4, 8, 16],
                        "linkage": [min(1.0, linked * f) for f in (1, 1.3, 1.6, 1.8, 2)],
                    },
                    "chance": 1 / ITEMS,
                    "used": sigma == 0.05,
                }
            )
    (path / "privacy.json").write_text(json.dumps(privacy))


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), users=200)
