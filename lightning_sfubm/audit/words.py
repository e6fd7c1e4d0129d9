"""The privacy report in plain words: questions a privacy officer asks, answered from the facts of the run alone."""

import math
from statistics import NormalDist

from lightning_sfubm.audit.facts import last_membership
from lightning_sfubm.audit.guarantee import simulated
from lightning_sfubm.audit.replay import GLOBAL
from lightning_sfubm.evaluation.run_folder import Json
from lightning_sfubm.privacy.attacks import area_interval, rate_limit
from lightning_sfubm.privacy.attacks.membership import FALSE_POSITIVES
from lightning_sfubm.privacy.rounding import round_up

_KINDS = {
    "semantics": "item vectors (numbers computed from product texts)",
    "teacher": "weights of the shared model (numbers computed from user behaviour)",
    "secagg masked input": "masked weights of the shared model, averaged over organisations",
    "semantics secagg masked input": "masked sums of item vectors by cluster, added up over organisations",
}


def answers(facts: Json) -> list[tuple[str, list[str]]]:
    """Questions with their answers, each a few sentences.

    Args:
        facts: see :func:`~lightning_sfubm.audit.facts.privacy_facts`.
    """
    return [
        ("What left each organisation?", _left(facts)),
        ("What never leaves?", [_NEVER]),
        ("Can somebody find out which products an organisation has?", _products(facts)),
        ("Can somebody find out whether a certain person is in the data?", _persons(facts)),
        ("Is there a guarantee?", _guarantee(facts)),
        ("Can this report be trusted?", _trust(facts)),
    ]


_LARGE_EPSILON = 10.0  #: beyond it the bound on the odds of two neighbours is above twenty thousand

_NEVER = (
    "User numbers, histories, ratings, product titles and product numbers: a message has no field for any of them, and "
    "one that does not follow its schema is refused. This is no promise that nothing can be inferred from the numbers that "
    "do leave; that is what the next questions are about."
)


_NO_VECTORS_KNOWN = (
    "No attack on item vectors is known; whether any were sent is not, for the ledger cannot be read whole."
)


def _left(facts: Json) -> list[str]:
    sentences = []
    rows = [row for row in facts["communication"]["rows"] if row["direction"] == "up"]
    for client in dict.fromkeys(row["client"] for row in rows):
        parts = []
        for row in (row for row in rows if row["client"] == client):
            what = _KINDS.get(row["kind"], f"{row['kind']} (keys and shares of the secure aggregation)")
            parts.append(f"{row['messages']} message{_s(row['messages'])} of {what}")
        sentences.append(f"{client} sent {', '.join(parts)}.")
    if unread := facts["communication"]["unread"]:  # what is left out must not pass for what was not sent
        more = "There may be more" if sentences else "This is not known"
        return [*sentences, f"{more}: {unread} line{_s(unread)} of the ledger cannot be read."]
    return sentences or ["Nothing: no message was sent."]


def _products(facts: Json) -> list[str]:
    return _recognised(facts) + _answered(facts) + _trained_products(facts["attacks"]["items"])


def _answered(facts: Json) -> list[str]:
    """What one organisation learns of another's products from what comes back to it."""
    rows = facts["attacks"]["answers"]
    back = [row for row in facts["communication"]["rows"] if row["direction"] == "down" and "semantics" in row["kind"]]
    if back and not rows:
        return [
            "What an organisation learns of the products of another from the item vectors that come back was not measured."
        ]
    return [
        f"{row['client']} itself, with a list of the {row['foreign']} products of the others, recognises in "
        f"{_percent(row['with_replacement']['value'])} of the {row['attacked']} answers tried the product of another that "
        f"weighs most in it ({_percent(row['without_answer']['value'])} without the answer, by its own upload; by guessing, "
        f"{_percent(row['chance'])}). {_percent(row['copies']['value'])} of them come close to a copy of one upload."
        for row in rows
    ]


def _from_guessing(auc: float) -> float:
    """How much an attack tells: one that is wrong more often than a coin tells its user to do the opposite."""
    return abs(auc - 0.5)


def _held_against_guessing(row: Json, groups: tuple[str, str], tried: int) -> tuple[float, float]:
    """Interval of the strongest attack's area, at a level of which all that were tried hold together with 95 % (Bonferroni).

    The best of several harmless attacks lies outside its own 95 % interval around guessing more often than one in twenty times.
    """
    z = NormalDist().inv_cdf(1 - 0.05 / (2 * tried))
    return area_interval(row["auc"]["value"], *(row[group] for group in groups), z=z)


def _trained_products(rows: list[Json]) -> list[str]:
    """The strongest of the attacks on updates, by domain."""
    sentences = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        tried = [row for row in rows if row["domain"] == domain]
        row = max(tried, key=lambda row: _from_guessing(row["auc"]["value"]))
        by_chance = ""
        if row["random_updates"]:
            furthest = max(row["random_updates"], key=_from_guessing)
            by_chance = f", {'up' if furthest >= 0.5 else 'down'} to {_percent(furthest)} by chance alone"
        _, high = _held_against_guessing(row, ("trained", "untrained"), len(tried))
        reversed_ = " Taken the other way round it is right in the rest." if high < 0.5 else ""
        sentences.append(
            f"{domain}: from what its training changed in the shared model, the strongest of {len(tried)} attacks tells a "
            f"product that its users took from one that they did not in {_percent(row['auc']['value'])} of cases "
            f"(guessing: 50 %{by_chance}).{reversed_}"
        )
    return sentences


def _recognised(facts: Json) -> list[str]:
    rows = facts["attacks"]["linkage"]
    if not rows:
        used = [
            (domain, entry)
            for domain, entries in facts["perturbation"].items()
            for entry in entries
            if entry.get("used") and isinstance(entry.get("linkage_with_replacement"), int | float)
        ]
        return [
            f"{domain}: somebody who has a list of candidate products would recognise "
            f"{_percent(entry['linkage_with_replacement'])} of them (simulated, not on recorded messages)."
            for domain, entry in used
        ] or [
            _NO_VECTORS_KNOWN
            if facts["communication"]["unread"]
            else "No item vectors were sent, or none were attacked."
        ]
    sentences = [
        f"{row['client']}: somebody who has a list of candidate products with their texts recognises "
        f"{_percent(row['with_replacement']['value'])} of the {row['attacked']} vectors tried, and "
        f"{_percent(row['without_replacement']['value'])} where each product may be named once; by guessing, "
        f"{_percent(row['chance'])}. Averaging all uploads gives {_percent(row['after_averaging']['value'])}."
        for row in rows
    ]
    return [*sentences, "The noise on item vectors is a heuristic: it blurs, and no bound follows from it."]


def _persons(facts: Json) -> list[str]:
    rows = last_membership(facts)
    if not rows:
        return [
            "This was not measured. "
            + (" ".join(facts["attacks"]["not_run"]) or "Run the audit on recorded messages to measure it.")
        ]
    sentences = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        tried = [row for row in rows if row["domain"] == domain]
        row = max(tried, key=lambda row: _from_guessing(row["auc"]["value"]))
        low, high = _held_against_guessing(row, ("members", "others"), len(tried))
        if low > 0.5:
            better = "better than guessing"
        elif high < 0.5:
            better = "worse than guessing: taken the other way round, it is right in the rest"
        else:
            better = "not told from guessing by a test of this size"
        level = (
            "at 95 %, as in the table"
            if len(tried) == 1
            else f"at 95 % for the best of {len(tried)}, each alone in the table"
        )
        most = max(tried, key=lambda row: row["tpr"]["value"])
        other = ""
        if most["tpr"]["value"] > row["tpr"]["value"]:
            other = f"; the attack that finds most of them ({_whom(most)}), {_percent(most['tpr']['value'])}"
        sentences.append(
            f"{domain}: in the strongest of {len(tried)} attacks tried ({_whom(row)}) the attacker, shown one person inside "
            f"and one outside, names the right one in {_percent(row['auc']['value'])} of cases (between {_percent(low)} and "
            f"{_percent(high)}, {level}; guessing: 50 %), which is {better}. Accusing one outsider in a hundred wrongly, they "
            f"find {_percent(row['tpr']['value'])} of the insiders{other} (guessing: 1 %)."
        )
    return sentences + _unmeasured(facts, {row["domain"] for row in rows})


def _whom(row: Json) -> str:
    """What an attack on persons attacks, and by what."""
    whom = "the shared model that every organisation gets" if row["client"] == GLOBAL else "its own update"
    return f"on {whom}, {_SCORES[row['score']]}"


def _unmeasured(facts: Json, attacked: set[str]) -> list[str]:
    """Who sent weights and was not attacked: silence about them must not pass for safety."""
    up = (row for row in facts["communication"]["rows"] if row["direction"] == "up")
    senders = {row["client"] for row in up if row["kind"] in ("teacher", "secagg masked input")}
    sentences = []
    for client in sorted(senders - attacked):
        why = [text for text in facts["attacks"]["not_run"] if f", {client}:" in text]
        sentences.append(
            " ".join([f"{client}: not measured, though it sent weights computed from user behaviour.", *why])
        )
    return sentences


_SCORES = {
    "loss": "by how well the model fits the person",
    "calibrated": "by comparison with models of the attacker's own",
}


def _guarantee(facts: Json) -> list[str]:
    sentences = _verdict(facts["guarantee"])
    for row in facts["mechanisms"]:
        what = f"{row['client']}, {_KINDS.get(row['kind'], row['kind'])}"
        if row["standing"] == "guarantee":
            whose = "products" if row["protects"] == "item" else "users"
            sentences.append(f"{what}: a bound for its own {whose}. {epsilon_words(row)}")
        elif row["standing"] == "simulated":
            whose = "products" if row["protects"] == "item" else "users"
            sentences.append(f"{what}: no, but in this simulation a bound for its own {whose}. {epsilon_words(row)}")
        elif row["standing"] == "unproven" and row["epsilon"] is None:
            sentences.append(f"{what}: no. {epsilon_words(row)}")
        elif row["standing"] == "unproven":
            sentences.append(
                f"{what}: no bound that could be relied on. Some messages state differential privacy, but not all of this "
                "organisation's are known to be covered by it."
            )
        elif row["standing"] == "hidden":
            sentences.append(
                f"{what}: the server sees the sum over organisations and no single update, if it follows the protocol."
            )
        elif row["standing"] == "heuristic":
            sentences.append(f"{what}: no. Noise is added, which is a heuristic and no guarantee.")
        else:
            sentences.append(f"{what}: no. They are sent as they are.")
    if any(simulated(row["parameters"]) for row in facts["mechanisms"]):
        sentences.append(
            "In this run the noise was derived from the run's seed: whoever knows the seed can remove it, so that what is said "
            "above holds for a simulation only. Set secret_dir to have each organisation draw its own."
        )
    return sentences


def _verdict(guarantee: Json) -> list[str]:
    """What the run as a whole promises to persons, before what each organisation does for its own."""
    number, standing = guarantee["messages"], guarantee["standing"]
    if standing == "nothing sent":
        return [
            "For persons none is needed for what the messages say: no message made from user behaviour left. Which items were "
            "sent is another matter: an item that enough users took is sent, so that a single user can decide about one, and "
            "for that there is no bound."
        ]
    if standing == "all":
        return [
            f"For persons, yes: each of the {number} messages made from user behaviour left with differential privacy. Which "
            "products an organisation has is no part of it."
        ]
    if standing == "simulated":
        return [
            f"For persons, in this simulation alone: each of the {number} messages made from user behaviour left with "
            "differential privacy, but with noise that follows from the run's seed. Nothing is promised against somebody "
            "who knows the seed."
        ]
    if standing == "unknown":
        return [
            "For persons this is not known, so do not count on one. "
            + " ".join(f"{doubt[0].upper()}{doubt[1:].rstrip('.')}." for doubt in guarantee["doubts"])
        ]
    without = sum(entry["messages"] for entry in guarantee["unprotected"])
    return [
        f"For persons, no: this run as a whole has no guarantee. Of {number} message{_s(number)} made from user behaviour, "
        f"{without} left without differential privacy: {'; '.join(map(_unprotected, guarantee['unprotected']))}."
    ]


def _unprotected(entry: Json) -> str:
    hidden = f" ({entry['hidden']} of them hidden from the server, which bounds nothing)" if entry["hidden"] else ""
    return f"{entry['client']}, {entry['messages']} of {entry['of']} with {_KINDS.get(entry['kind'], entry['kind'])}{hidden}"


def epsilon_words(row: Json) -> str:
    """What an (epsilon, delta) means, with the neighbouring relation; ``row`` is a guarantee among the mechanisms."""
    epsilon, delta, neighbours = row["epsilon"], row["delta"], row["neighbours"]
    if not isinstance(epsilon, int | float) or not math.isfinite(epsilon):
        return "Differential privacy was configured without noise: epsilon is infinite, and nothing is promised."
    wrongly, most = f"{100 * FALSE_POSITIVES:g} %", _at_most(rate_limit(epsilon, delta, FALSE_POSITIVES))
    if row["protects"] == "item":
        found = f"names {wrongly} of the products that are not there finds on average at most {most} of those that are"
    else:
        found = f"wrongly accuses {wrongly} of those who took no part finds on average at most {most} of those who did"
    odds = math.exp(min(epsilon, 50.0))  # of telling two neighbours apart, where delta is 0
    right = (odds + delta) / (1 + odds)  # Kairouz et al. 2015: the best of all tests, both neighbours being as likely
    hollow = " So large an epsilon promises next to nothing." if epsilon > _LARGE_EPSILON else ""
    return (
        f"Differential privacy with epsilon {round_up(epsilon, 3)} at delta {round_up(delta, 2)}, where two data sets are "
        f"neighbours if they differ by {neighbours}: {against(row)}, a test on the messages of all rounds "
        f"together that {found}, and of two neighbours that are as likely no test names the right one in more than "
        f"{_at_most(right)} of cases. It does not cover what else is published: metrics, logs, settings chosen by "
        f"them.{hollow}"
    )


def against(row: Json) -> str:
    """Whom a guarantee among the mechanisms holds against.

    Noise that all clients add in shares is not known to hold against more than its line says; that of a client's own is.
    """
    seeded = row.get("standing") == "simulated"
    if adversary := row.get("adversary"):
        holds = f"against {adversary}"
    elif row["protects"] == "item":
        holds = "against whom is not stated"
    else:
        holds = f"whatever {'else ' if seeded else ''}the attacker knows"
    return f"if nobody knows the run's seed, {holds}" if seeded else holds


def _trust(facts: Json) -> list[str]:
    check = facts["self_check"]
    stands = {
        True: "Every number on what was sent was compared with the ledger and agrees.",
        False: "No: the comparison with the ledger below found contradictions.",
        None: "Only as far as the ledger goes: every number on what was sent agrees with it, but "
        + "; ".join(check["unchecked"])
        + ".",
    }[check["holds"]]
    return [
        f"{stands} The ledger is a file in which every line carries the hash of the line before it. Whoever can write the file "
        "can write a new one as a whole: note the hash of its last line elsewhere to be able to tell. Attacks show what these "
        "attackers found, not what a cleverer one could find."
    ]


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _at_most(share: float) -> str:
    """A share that is not exceeded. Less what twelve digits do not hold: exp(log(3)) is not 3 to the last bit."""
    return f"{round_up(float(f'{100 * share:.12g}'), 3)} %"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"
