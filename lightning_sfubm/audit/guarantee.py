"""What differential privacy promises for a run as a whole: a bound holds only where every message is covered by it."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sfubm.evaluation.run_folder import Json
from lightning_sfubm.federated.ledger import INITIAL_WEIGHTS, SAME, TEXTS_ALONE, UNTRAINED

_KEYS_AND_SHARES = ("secagg keys", "secagg shares", "secagg unmask")  # they hold nothing of the data
_TERMS = ("mechanism", "neighbours", "adversary", "secret", "delta")  #: in which all bounds of a client must agree
_OF_ITEMS = ("semantics", "semantics secagg masked input")


def content_of(line: Mapping[str, Any]) -> str | None:
    """Whose data a message that goes up holds: ``"item"``, ``"user"``, or ``None`` = nobody's.

    A kind that is not known counts as made of users' data, and so do item vectors whose line does not say that nothing in them
    was trained.
    """
    kind, said = line.get("kind", ""), mechanism_of(line).get("content")
    if kind.removeprefix("semantics ") in _KEYS_AND_SHARES or (said == INITIAL_WEIGHTS and line.get("round") == 0):
        return None
    return "item" if kind in _OF_ITEMS and said in (TEXTS_ALONE, UNTRAINED) else "user"


def mechanism_of(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a line of a ledger says of its message's protection; empty where it says nothing that can be read."""
    stated = line.get("mechanism")
    return stated if isinstance(stated, dict) else {}


def coverage(lines: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Which messages of each client differential privacy covers.

    Args:
        lines: of a ledger, in order; what was sent again counts once.

    Returns:
        One row for each client and each of ``"item"`` and ``"user"`` that its messages hold (``protects``): ``messages``,
        ``unprotected`` (by kind: how many without a bound, ``of`` how many, and how many of them ``hidden`` from the
        server), ``bound`` (what the last message states, ``None`` unless it covers all of them) and ``doubt`` (why there is
        none although every message states one).
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    known: set[str] = set()
    for line in lines:
        whose, same = content_of(line), json.dumps([line.get(key) for key in SAME])
        again = line.get("resent") and same in known
        known.add(same)
        if line["direction"] != "down" and whose is not None and not again:
            groups.setdefault((line["client"], whose), []).append(line)
    return [_covered(client, whose, sent) for (client, whose), sent in sorted(groups.items())]


def guarantee(lines: Iterable[Mapping[str, Any]], doubts: Iterable[str]) -> Json:
    """The guarantee of a run for persons.

    Args:
        lines: of its ledger.
        doubts: why messages may have left that are not in it, or that it states wrongly; empty = it is known to be whole.

    Returns:
        ``standing``: ``"none"`` where a message made of users' data has no bound, or else ``"unknown"`` where there is a doubt,
        ``"nothing sent"`` where no such message left, ``"simulated"`` where all have a bound but the noise of one follows
        from the run's seed, or ``"all"``. With it ``messages`` (how many are made of users' data),
        ``unprotected`` (those without a bound, by client and kind) and ``doubts``.
    """
    rows = [row for row in coverage(lines) if row["protects"] == "user"]
    covered = "simulated" if any(simulated(row["bound"] or {}) for row in rows) else "all"
    unprotected = [{"client": row["client"], **entry} for row in rows for entry in row["unprotected"]]
    doubts = [*doubts, *(f"{row['client']}: {row['doubt']}" for row in rows if row["doubt"])]
    standing = "none" if unprotected else "unknown" if doubts else covered if rows else "nothing sent"
    messages = sum(row["messages"] for row in rows)
    return {"standing": standing, "messages": messages, "unprotected": unprotected, "doubts": doubts}


def simulated(parameters: Mapping[str, Any]) -> bool:
    """Whether noise follows from the run's seed: whoever knows that can take it off."""
    return "simulation" in str(parameters.get("secret", ""))


def _covered(client: str, whose: str, lines: list[Mapping[str, Any]]) -> Json:
    stated = [_stated(line, whose) for line in lines]
    sent = Counter(line.get("kind", "") for line in lines)
    without = [line for line, privacy in zip(lines, stated, strict=True) if privacy is None]
    hidden = Counter(line.get("kind", "") for line in without if mechanism_of(line).get("secure aggregation"))
    unprotected = [
        {"kind": kind, "messages": number, "of": sent[kind], "hidden": hidden[kind]}
        for kind, number in sorted(Counter(line.get("kind", "") for line in without).items())
    ]
    bounds = [privacy for privacy in stated if privacy is not None]
    doubt = None if unprotected else _doubt(bounds, list(sent))
    return {
        "client": client,
        "protects": whose,
        "messages": len(lines),
        "unprotected": unprotected,
        "bound": None if unprotected or doubt else bounds[-1],
        "doubt": doubt,
    }


def _doubt(bounds: list[Mapping[str, Any]], kinds: list[str]) -> str | None:
    """Why the last of several bounds may not cover the messages before it."""
    terms = {json.dumps([bound.get(term) for term in _TERMS]) for bound in bounds}
    epsilons = [bound["epsilon"] for bound in bounds]
    if len(kinds) > 1 or len(terms) > 1:
        return "its messages state bounds of different kinds, and how they add up is not known"
    if epsilons != sorted(epsilons):
        return "epsilon falls from one message to a later one, so that the later one does not cover all before it"
    steps = [bound["steps"] for bound in bounds if isinstance(bound.get("steps"), int)]
    if steps != sorted(set(steps)):
        return "two of its messages state the same steps of training, so that the later one does not count what the other spent"
    return None


def _stated(line: Mapping[str, Any], whose: str) -> Mapping[str, Any] | None:
    """The finite bound a line states for this content; ``None`` where any part of one is missing."""
    privacy = mechanism_of(line).get("differential privacy")
    if not isinstance(privacy, dict) or privacy.get("protects", "user") != whose or not privacy.get("neighbours"):
        return None
    epsilon, delta = privacy.get("epsilon"), privacy.get("delta")
    if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
        return None
    if not (0 <= epsilon < math.inf and 0 <= delta < 1):
        return None
    return None if "__weight__" in line.get("tensors", {}) else privacy  # the number of examples has no noise
