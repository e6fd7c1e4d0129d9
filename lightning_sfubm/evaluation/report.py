"""Build the report of a run folder: ``python -m lightning_sfubm.evaluation.report RUN_DIR``.

Writes ``report.html`` (one self-contained file) and ``report.json`` (the same facts) into the folder.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sfubm.errors import DataError, SFUBMError
from lightning_sfubm.evaluation.facts import run_facts
from lightning_sfubm.evaluation.report_template import CSS, TEMPLATE
from lightning_sfubm.evaluation.results import COLD_BELOW, SHORT_UP_TO, write_atomically
from lightning_sfubm.evaluation.run_folder import Json, RunFolder
from lightning_sfubm.privacy.rounding import round_up

if TYPE_CHECKING:
    import jinja2


def build_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``report.json`` for a run folder; parts that are missing say so in the report.

    Args:
        run_dir: see :mod:`lightning_sfubm.evaluation.run_folder` for what it may hold.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: there is no such folder, or it holds no federated run and no results.
    """
    from lightning_sfubm.evaluation.report_plots import figures, svg_uri  # matplotlib only where a report is made

    folder = RunFolder.read(run_dir)
    if not (folder.run or folder.results or folder.history or folder.problems):
        raise DataError(
            f"{folder.path}: nothing to report: neither run.json nor results nor history.jsonl; give the folder of a "
            "federated run or experiment (trainer.default_root_dir)"
        )
    facts = run_facts(folder)
    html = render_html(facts, {name: svg_uri(figure) for name, figure in figures(facts).items()})
    write_atomically(folder.path / "report.json", json.dumps(facts, indent=1, allow_nan=False).encode())
    report = folder.path / "report.html"
    write_atomically(report, html.encode())
    return report


def render_html(facts: Json, figures: dict[str, str]) -> str:
    """The report as HTML.

    Args:
        facts: see :func:`~lightning_sfubm.evaluation.facts.run_facts`.
        figures: data URI of each figure.

    Returns:
        One self-contained document; all text is escaped.
    """
    return (
        template_environment()
        .from_string(TEMPLATE)
        .render(
            css=CSS,
            figures=figures,
            run=facts["run"],
            domains=facts["domains"],
            comparisons=facts["comparisons"],
            privacy=facts["privacy"],
            averaging=_averaging(facts["privacy"]),
            communication=facts["communication"],
            problems=facts["problems"],
            protocol=protocol_words(facts),
            cards=list(facts["data_cards"]),
            card_rows=_card_rows(list(facts["data_cards"].values())),
            config=facts["config"],
            cold=COLD_BELOW,
            short=SHORT_UP_TO,
        )
    )


def template_environment() -> "jinja2.Environment":
    """Jinja with escaping, and the filters that write numbers in all reports."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    numbers = {"num": _num, "signed": _signed, "percent": _percent, "p": _p_value}
    numbers |= {"count": _count, "seconds": _seconds, "bytes": _bytes}
    environment.filters |= {name: _or_dash(form) for name, form in numbers.items()}
    environment.filters |= {
        "words": _words,
        "up": round_up,
        "flat": lambda mapping: list(_flat(mapping)),
    }
    environment.filters["own_names"] = own_names
    return environment


def own_names(domains: Sequence[Json]) -> list[str]:
    """Names of the domains, each once: a table of all its users is no other domain."""
    return list(dict.fromkeys(domain["name"].removesuffix(", all users") for domain in domains))


def protocol_words(facts: Json) -> list[str]:
    """The protocol in sentences, as far as it follows from the results."""
    sentences = []
    alike: dict[int, list[Json]] = {}
    for domain in facts["domains"]:
        if domain["chance"]["hit@1"] is not None:
            alike.setdefault(domain["num_candidates"], []).append(domain)
    for candidates, domains in alike.items():
        chance = domains[0]["chance"]
        sentences.append(
            f"{', '.join(own_names(domains))}: each method ranks the same stored list of {candidates} items per user, the one "
            f"that followed and {candidates - 1} others. Chance level of Hit@1 is 1/{candidates} = {chance['hit@1']:.3f}, "
            f"of NDCG@10 {chance['ndcg@10']:.3f}, of MRR {chance['mrr']:.3f}."
        )
    for domain in facts["domains"]:
        if len(domain["candidate_hashes"]) > 1:
            sentences.append(
                f"Attention: results of {domain['name']} come from {len(domain['candidate_hashes'])} different "
                "candidate lists; rows with different lists are not comparable."
            )
    return sentences or ["There are no results, so no protocol can be stated."]


def _averaging(privacy: dict[str, list[Json]]) -> Json:
    """The averaging attack as a table: upload counts, and per domain rows of (sigma, share linked at each count)."""
    entries = [entry for rows in privacy.values() for entry in rows if entry.get("averaging")]
    uploads = sorted({count for entry in entries for count in entry["averaging"]["uploads"]})
    domains: dict[str, list[tuple[float, list[float | None]]]] = {}
    for domain, rows in privacy.items():
        for entry in rows:
            if attack := entry.get("averaging"):
                linked = dict(zip(attack["uploads"], attack["linkage"], strict=True))
                domains.setdefault(domain, []).append((entry["sigma"], [linked.get(count) for count in uploads]))
    return {"uploads": uploads, "domains": domains}


def _card_rows(cards: list[Json]) -> list[tuple[str, list[Any]]]:
    flat = [dict(_flat(card)) for card in cards]
    keys = dict.fromkeys(key for card in flat for key in card)
    return [(key, [card.get(key, "–") for card in flat]) for key in keys]


def _flat(mapping: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, value


def _or_dash(form: Callable[[float], str]) -> Callable[[Any], str]:
    """A formatter that prints a dash for whatever is not a number: ``None``, or a key an older run did not write."""
    return lambda value: form(value) if isinstance(value, int | float) else "–"


def _num(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value > 0 else "0"


def _count(value: float) -> str:
    return f"{value:,}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def main(arguments: list[str] | None = None) -> int:
    """Command line: build the report and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_sfubm.evaluation.report", description=build_report.__doc__
    )
    parser.add_argument("run_dir", type=Path)
    try:
        print(build_report(parser.parse_args(arguments).run_dir))
    except SFUBMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
