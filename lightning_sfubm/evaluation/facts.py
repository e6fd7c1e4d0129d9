"""The facts of a run as plain JSON values: what ``report.json`` holds and what the HTML and the terminal show."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.results import METRICS, PerUserResults, chance
from lightning_sfubm.evaluation.run_folder import Json, RunFolder
from lightning_sfubm.evaluation.significance import Estimate, holm, paired_difference
from lightning_sfubm.privacy.rounding import round_up

SLICE_METRICS = ("hit@1", "ndcg@10")
COMPARED = ("hit@1", "ndcg@10")


def run_facts(folder: RunFolder) -> Json:
    """Everything the report states, in JSON values; numbers that are not defined are ``None``."""
    return plain(
        {
            "run": folder.run,
            "domains": [domain_facts(domain, rows) for domain, rows in _ordered(folder)],
            "comparisons": comparison_facts(folder),
            "privacy": folder.privacy,
            "communication": ledger_facts(folder.ledger, folder.unread),
            "history": folder.history,
            "data_cards": folder.cards,
            "config": folder.config,
            "problems": folder.problems,
        }
    )


def domain_facts(domain: str, rows: list[PerUserResults]) -> Json:
    """The result table of one domain: rows of one group stand together, where the first of them stood.

    Args:
        domain: its name.
        rows: results in the order of the table.
    """
    groups = list(dict.fromkeys(r.meta.group for r in rows))
    rows = sorted(rows, key=lambda r: groups.index(r.meta.group))
    candidates = max((r.meta.num_candidates for r in rows), default=0)
    return {
        "name": domain,
        "num_candidates": candidates,
        "num_items": max((r.meta.num_items for r in rows), default=0),
        "chance": {metric: chance(metric, candidates) for metric in METRICS},
        "splits": sorted({r.meta.split for r in rows}),
        "candidate_hashes": sorted({r.meta.candidate_hash for r in rows}),
        "ties": sorted({r.meta.ties for r in rows}),
        "rows": [_row(r) for r in rows],
    }


def _row(result: PerUserResults) -> Json:
    meta = result.meta
    slices = {}
    for name, part in result.slices().items():
        summary = part.summary()
        slices[name] = {"users": len(part), **{metric: _estimate(summary[metric]) for metric in SLICE_METRICS}}
    return {
        "method": meta.method,
        "label": meta.title,
        "group": meta.group,
        "users": len(result),
        "metrics": {name: _estimate(value) for name, value in result.summary().items()},
        "slices": slices,
        "trainable_params": meta.trainable_params,
        "train_cpu_s": meta.extra.get("train_cpu_s"),
        "cpu_s": meta.cpu_s,
        "wall_s": meta.wall_s,
        "peak_rss_mb": meta.peak_rss_mb,
        "seed": meta.seed,
        "extra": meta.extra,
    }


def _estimate(estimate: Estimate) -> Json:
    return estimate._asdict()


def result_rows(results: Iterable[PerUserResults]) -> list[Json]:
    """One flat row per result, for tables of loggers: names, users, every metric, and bounds of Hit@1.

    Args:
        results: in the order of the table.
    """
    rows = []
    for result in results:
        summary = result.summary()
        row: Json = {
            "domain": result.meta.domain,
            "method": result.meta.method,
            "label": result.meta.title,
            "group": result.meta.group,
            "users": len(result),
            **{name: estimate.value for name, estimate in summary.items()},
            "hit@1_low": summary["hit@1"].low,
            "hit@1_high": summary["hit@1"].high,
        }
        rows.append(plain(row))
    return rows


def comparison_facts(folder: RunFolder) -> list[Json]:
    """Paired differences a - b as ``run.json`` asks for, or of every method against its ``reference_method``.

    A comparison that cannot be made states why. Holm's correction runs over all McNemar tests of the run.
    """
    wanted = folder.run.get("comparisons")
    if wanted is None:
        reference = folder.run.get("reference_method")
        methods = dict.fromkeys(r.meta.method for rows in folder.results.values() for r in rows)
        wanted = [{"a": method, "b": reference} for method in methods if reference and method != reference]
    facts: list[Json] = []
    for domain, rows in _ordered(folder):
        by_method = {r.meta.method: r for r in rows}
        labels = {method: r.meta.title for method, r in by_method.items()}
        for pair in wanted:
            if pair.get("domain", domain) != domain:
                continue
            a, b = pair["a"], pair["b"]
            fact: Json = {"domain": domain, "a": a, "b": b, "label_a": labels.get(a, a), "label_b": labels.get(b, b)}
            missing = [method for method in (a, b) if method not in by_method]
            if missing and domain not in folder.run.get("domains", [domain]):
                continue  # a further table of a domain, on other users, need not hold every method
            if missing:
                fact["not_compared"] = f"no results of {' and '.join(missing)}"
            else:
                try:
                    fact |= {m: paired_difference(by_method[a], by_method[b], m)._asdict() for m in COMPARED}
                except DataError as error:
                    fact["not_compared"] = str(error)
            facts.append(fact)
    tested = [fact for fact in facts if "hit@1" in fact]
    for fact, p in zip(tested, holm([fact["hit@1"]["p_mcnemar"] for fact in tested]), strict=True):
        fact["p_holm"] = p
    return facts


def ledger_facts(ledger: list[Json], unread: int = 0) -> Json:
    """Messages and bytes per client, direction and kind, with the tensors they held.

    Args:
        ledger: its lines.
        unread: lines beside them that are no entries.

    Returns:
        ``rows`` (one per client, direction and kind), ``totals`` (bytes up and down), ``messages``, ``resent`` (what an
        interrupted run sent again, word for word, when it went on; it is not counted twice) and ``unread``.
    """
    groups: dict[tuple[str, str, str], list[Json]] = {}
    once = [line for line in ledger if not line.get("resent")]
    for line in once:
        groups.setdefault((line["client"], line["direction"], line.get("kind", "")), []).append(line)
    rows = []
    for (client, direction, kind), lines in sorted(groups.items(), key=lambda item: (item[0][1] != "up", item[0])):
        tensors = Counter(_tensor(name, tensor) for line in lines for name, tensor in line.get("tensors", {}).items())
        # One guarantee covers all messages up to the one it stands at: of those, the last is told.
        mechanisms = {_what(line["mechanism"]): _words(line["mechanism"]) for line in lines if line.get("mechanism")}
        rows.append(
            {
                "client": client,
                "direction": direction,
                "kind": kind,
                "messages": len(lines),
                "rounds": sorted({line["round"] for line in lines if line.get("round") is not None}),
                "bytes": sum(line["bytes"] for line in lines),
                "tensors": list(tensors),
                "mechanisms": list(mechanisms.values()),
            }
        )
    totals = {way: sum(row["bytes"] for row in rows if row["direction"] == way) for way in ("up", "down")}
    resent = len(ledger) - len(once)
    return {"rows": rows, "totals": totals, "messages": len(once), "resent": resent, "unread": unread}


def _tensor(name: str, tensor: Any) -> str:
    """``"vectors 7×4 float32"``; the form of a line does not say what stands in its tensors."""
    stated = tensor if isinstance(tensor, dict) else {}
    shape = stated.get("shape")
    sizes = "×".join(map(str, shape)) if isinstance(shape, list) else ""
    return f"{name} {sizes} {stated.get('dtype', '')}".strip()


def _what(mechanism: Any) -> str:
    """The mechanism without what grows from message to message."""
    if isinstance(mechanism, dict):
        kept = {key: _what(value) for key, value in mechanism.items() if key not in ("epsilon", "steps")}
        return json.dumps(kept, sort_keys=True)
    return str(mechanism)


def _words(mechanism: Any) -> str:
    """``{"mechanism": "noise", "sigma": 0.1}`` as "noise, sigma 0.1"; epsilon and delta stand together."""
    if not isinstance(mechanism, dict):
        return f"{mechanism:.4g}" if isinstance(mechanism, float) else str(mechanism)
    words = []
    for key, value in mechanism.items():
        if key == "epsilon":
            words.append(f"epsilon {_at_least(value)} at delta {_at_least(mechanism.get('delta'))}")
        elif key == "mechanism":
            words.append(str(value))
        elif key != "delta" or "epsilon" not in mechanism:
            words.append(f"{key}: {_words(value)}" if isinstance(value, dict) else f"{key} {_words(value)}")
    return ", ".join(words)


def _at_least(value: Any) -> str:
    return round_up(value, 4) if isinstance(value, float) else _words(value)


def _ordered(folder: RunFolder) -> list[tuple[str, list[PerUserResults]]]:
    return [(domain, folder.results[domain]) for domain in folder.domains if domain in folder.results]


def plain(value: Any) -> Any:
    """The value with NaN and infinities as ``None``, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
