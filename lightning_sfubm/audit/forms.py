"""Forms of ``audit.json`` and ``privacy_curve.json``, as far as the privacy report reads them."""

import json
from pathlib import Path
from typing import Any

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.forms import (
    Form,
    anything,
    by_name,
    each,
    integer,
    nullable,
    number,
    one_of,
    read_json,
    record,
    text,
)


def _within(form: Form, low: int, high: int) -> Form:
    """A number of that form which lies in a range."""

    def check(value: Any, where: str) -> str | None:
        return form(value, where) or (None if low <= value <= high else f"{where} is not between {low} and {high}")

    return check


_GROUP = _within(integer, 1, 10**9)  # an interval follows from it
_ESTIMATE = record({"value": _within(number, 0, 1), "low": number, "high": number})
_CHANCES = record({"auc": number, "tpr": number})
_BOUNDS = record({"auc": nullable(number), "tpr": nullable(number)})
_LINKAGE = dict.fromkeys(("with_replacement", "without_replacement", "after_averaging"), _ESTIMATE)
_ANSWERS = dict.fromkeys(("with_replacement", "without_answer", "copies"), _ESTIMATE)
_SCORED = {"domain": text, "client": text, "round": integer, "auc": _ESTIMATE}
#: what ``lightning-sfubm audit`` writes
AUDIT = record(
    {},
    {
        "check": record({"head": text, "problems": each(text)}),
        "not_run": each(text),
        "settings": by_name(anything),
        "linkage": each(record({"client": text, "attacked": integer, "chance": number, **_LINKAGE})),
        "attribute": each(record({"client": text, "attribute": text, "accuracy": _ESTIMATE})),
        "membership": each(
            record(
                {
                    **_SCORED,
                    "score": one_of("loss", "calibrated"),
                    "tpr": _ESTIMATE,
                    "chance": _CHANCES,
                    "members": _GROUP,
                    "others": _GROUP,
                },
                {"limit": _BOUNDS, "epsilon": number},
            )
        ),
        "items": each(
            record(
                {
                    **_SCORED,
                    "score": text,
                    "random_updates": each(number),
                    "trained": _GROUP,
                    "untrained": _GROUP,
                },
                {"epsilon": number},
            )
        ),
        "answers": each(
            record({"client": text, "foreign": integer, "attacked": integer, "chance": number, **_ANSWERS})
        ),
    },
)
_MEASURED = record({"value": nullable(number), "low": nullable(number), "high": nullable(number)})
#: what ``lightning-sfubm audit --beside`` writes
CURVE: Form = each(
    record(
        {
            "domain": text,
            "epsilon": nullable(number),
            "sigma": nullable(number),
            "membership": by_name(record({"auc": _ESTIMATE, "tpr": _ESTIMATE}, {"limit": _BOUNDS})),
            "utility": by_name(record({"hit@1": _MEASURED, "ndcg@10": _MEASURED})),
        }
    )
)


def read_formed(path: Path, form: Form) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: naming the file and what in it is not of the form.
    """
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: broken JSON ({error})") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if (wrong := form(value, "")) is not None:
        raise DataError(f"{path}: not as 'lightning-sfubm audit' writes it: {wrong.strip()}")
    return value
