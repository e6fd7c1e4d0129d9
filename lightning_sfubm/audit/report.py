"""Write ``privacy_report.html`` (one self-contained file) and ``privacy_report.json`` (the same facts) into a run folder."""

import json
from pathlib import Path

from lightning_sfubm.audit.curve import UTILITY
from lightning_sfubm.audit.facts import last_membership, privacy_facts
from lightning_sfubm.audit.template import TEMPLATE
from lightning_sfubm.audit.words import against, answers
from lightning_sfubm.evaluation.report import template_environment
from lightning_sfubm.evaluation.report_template import CSS
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.evaluation.run_folder import Json, RunFolder


def build_privacy_report(run_dir: Path) -> Path:
    """Build the privacy report of a run from its ledger, and from ``audit.json`` where there is one.

    Args:
        run_dir: folder of the run.

    Returns:
        Path of ``privacy_report.html``.

    Raises:
        DataError: there is no such folder.
    """
    from lightning_sfubm.audit.plots import SCORES, privacy_figures_of  # matplotlib only where a report is made
    from lightning_sfubm.evaluation.report_plots import svg_uri

    folder = RunFolder.read(run_dir)
    facts = privacy_facts(folder)
    facts["in_plain_words"] = [{"question": question, "answer": sentences} for question, sentences in answers(facts)]
    html = render(facts, {name: svg_uri(figure) for name, figure in privacy_figures_of(facts).items()}, SCORES)
    write_atomically(folder.path / "privacy_report.json", json.dumps(facts, indent=1, allow_nan=False).encode())
    report = folder.path / "privacy_report.html"
    write_atomically(report, html.encode())
    return report


def render(facts: Json, figures: dict[str, str], scores: dict[str, str]) -> str:
    """The report as HTML; all text is escaped.

    Args:
        facts: see :func:`~lightning_sfubm.audit.facts.privacy_facts`, with ``in_plain_words``.
        figures: data URI of each figure.
        scores: names of the membership scores.
    """
    return (
        template_environment()
        .from_string(TEMPLATE)
        .render(
            css=CSS,
            figures=figures,
            scores=scores,
            against=against,
            run=facts["run"],
            ledger=facts["ledger"],
            check=facts["self_check"],
            communication=facts["communication"],
            mechanisms=facts["mechanisms"],
            attacks=facts["attacks"],
            members=last_membership(facts),
            curve=facts["curve"],
            branches=[name for name in UTILITY.values() if any(name in point["utility"] for point in facts["curve"])],
            audit=facts["audit"],
            problems=facts["problems"],
            answers=[(entry["question"], entry["answer"]) for entry in facts["in_plain_words"]],
        )
    )
