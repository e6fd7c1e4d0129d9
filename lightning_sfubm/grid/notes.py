"""What the tables of a grid mean, in sentences, as far as the cells do not say it themselves."""

from collections.abc import Iterable

from lightning_sfubm.evaluation.results import chance
from lightning_sfubm.grid.cells import Json

_SHOWN = 6  #: distinct values told of one kind; further ones are counted


def table_notes(cells: list[Json], source: str | None = None) -> list[str]:
    """Sentences that stand above the tables.

    Args:
        cells: those that the tables are built from.
        source: path of the grid file as it can be given again; ``None`` = not told.
    """
    if not cells:
        return []
    notes = [
        "Hit@1 is a mean over seeds: ± is the standard deviation over them, and with one seed brackets are the 95 % interval "
        "over users (Wilson).",
        *map(_chance, sorted({cell["num_candidates"] for cell in cells})),
        "full NDCG@10: over the whole catalogue. valid: share of answers that name exactly one candidate; any other answer is "
        "a miss. –: not defined for the row, or not known.",
        "train CPU-s: CPU seconds of the row's own training, without what it builds on. rank CPU-s: those of ranking the "
        "table's users. Both are means over seeds.",
        "Paired differences are means over the seeds that both methods have, with 95 % bootstrap intervals over users. "
        "p (sign flips) is of Hit@1 over the same users and seeds, exact (with one seed it is McNemar's test), or, after ≈, by "
        "normal approximation from the interval where not all users were at hand; p (Holm) corrects it over all differences of "
        "the grid.",
        f"Commits of the cells: {_listed(cell.get('commit') for cell in cells)}. Machines: {_listed(map(_machine, cells))}.",
    ]
    return notes if source is None else [*notes, f"Built by `lightning-sfubm results --grid {source}`."]


def _chance(candidates: int) -> str:
    levels = ", ".join(f"{name} {chance(name.lower(), candidates) or 0:.3f}" for name in ("Hit@1", "NDCG@10"))
    return f"Each row ranks the same stored list of {candidates} candidates a user; chance: {levels}."


def _listed(values: Iterable[str | None]) -> str:
    known = sorted({value for value in values if value})
    more = len(known) - _SHOWN
    return "; ".join(known[:_SHOWN]) + (f" and {more} more" if more > 0 else "") if known else "not known"


def _machine(cell: Json) -> str | None:
    """Processor, cores and memory; how many threads of it a run had stands in the cell."""
    hardware = cell.get("hardware") or {}
    told = (("cpu", "{}"), ("cores", "{} cores"), ("memory_gib", "{} GiB"))
    words = [form.format(hardware[key]) for key, form in told if hardware.get(key)] + (hardware.get("gpus") or [])
    return ", ".join(words) or None
