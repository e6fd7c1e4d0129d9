"""The parts of a schedule as plain values: what two configurations are compared by, wherever each was made."""

import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

#: arguments that are nobody else's business, or another place on every machine
_OWN = ("secret", "password", "token")
_DEEPEST = 6  # parts within parts


def describe(part: object, depth: int = 0) -> dict[str, Any]:
    """Class path of a part and the arguments it was made with, as JSON values: the same from a configuration and from Python.

    Arguments are read from the attributes of the same name, where the parts of this package keep them. Left out are those that
    a part does not keep, and secrets with the places they are in.

    Args:
        part: an aggregator, or what is given to one.
        depth: of the part within others.
    """
    kind = type(part)
    described: dict[str, Any] = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {}}
    for name in _arguments(kind) if depth < _DEEPEST else []:
        if hasattr(part, name) and not any(word in name for word in _OWN):
            described["init_args"][name] = _plain(getattr(part, name), depth + 1)
    return described


def _arguments(kind: type) -> list[str]:
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):  # a class that is not written in Python
        return []
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # JSON has neither infinity nor nan
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, depth) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth) for entry in value]
    return describe(value, depth)
