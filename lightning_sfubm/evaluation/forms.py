"""Forms of JSON values: what is not as this product writes it is told by its place, and never met by a traceback later on."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

#: says what is wrong with a value that stands at a place, in words; ``None`` = nothing
Form = Callable[[Any, str], str | None]
_MAX_DEPTH, _MAX_DIGITS = 40, 300  #: deeper nesting ends in the recursion limit, and a longer number is no float


def read_json(text: str | bytes) -> Any:
    """The value a text holds.

    Raises:
        ValueError: it is no JSON, or nested or with numbers beyond what is ever written here.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value], 0
    while level := [child for node in level for child in _children(node)]:
        if (depth := depth + 1) > _MAX_DEPTH:
            raise ValueError("nested too deeply")
    return value


def anything(value: Any, where: str) -> str | None:
    """Any value."""
    return None


def text(value: Any, where: str) -> str | None:
    """A string."""
    return None if isinstance(value, str) else f"{where} is no text"


def integer(value: Any, where: str) -> str | None:
    """A whole number."""
    return None if type(value) is int else f"{where} is no whole number"


def number(value: Any, where: str) -> str | None:
    """A finite number."""
    finite = type(value) in (int, float) and math.isfinite(value)
    return None if finite else f"{where} is no finite number"


def nullable(form: Form) -> Form:
    """``null``, or of that form."""
    return lambda value, where: None if value is None else form(value, where)


def one_of(*words: str) -> Form:
    """One of some strings."""
    return lambda value, where: None if value in words else f"{where} is none of {', '.join(words)}"


def each(form: Form) -> Form:
    """A list of such values."""

    def check(value: Any, where: str) -> str | None:
        if not isinstance(value, list):
            return f"{where} is no list"
        return _first(form(entry, f"{where}[{place}]") for place, entry in enumerate(value))

    return check


def by_name(form: Form) -> Form:
    """An object all of whose values are of that form."""

    def check(value: Any, where: str) -> str | None:
        if not isinstance(value, dict):
            return f"{where} is no object"
        return _first(form(entry, f"{where}.{name}".lstrip(".")) for name, entry in value.items())

    return check


def record(needed: Mapping[str, Form], beside: Mapping[str, Form] | None = None) -> Form:
    """An object with these entries.

    Args:
        needed: entries that must be there.
        beside: entries that may be missing or ``null``; of others anything is right.
    """

    def check(value: Any, where: str) -> str | None:
        if not isinstance(value, dict):
            return f"{where or 'the content'} is no object"
        forms = [*needed.items(), *((name, nullable(form)) for name, form in (beside or {}).items() if name in value)]
        return _first(
            form(value[name], f"{where}.{name}".lstrip("."))
            if name in value
            else f"{where}.{name}".lstrip(".") + " is missing"
            for name, form in forms
        )

    return check


def _first(complaints: Any) -> str | None:
    return next((complaint for complaint in complaints if complaint is not None), None)


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("a number of too many digits")
    return int(digits)
