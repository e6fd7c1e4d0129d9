"""The privacy report in plain words: questions a privacy officer asks, answered from the facts of the run alone."""

import math

from lightning_sfubm.audit.facts import last_membership
from lightning_sfubm.audit.replay import GLOBAL
from lightning_sfubm.evaluation.run_folder import Json

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


_LARGE_EPSILON = 10.0  #: beyond it the odds may rise more than twenty-thousandfold

_NEVER = (
    "User numbers, histories, ratings, product titles and product numbers: a message has no field for any of them, and "
    "one that does not follow its schema is refused. This is no promise that nothing can be inferred from the numbers that "
    "do leave; that is what the next questions are about."
)


def _left(facts: Json) -> list[str]:
    sentences = []
    rows = [row for row in facts["communication"]["rows"] if row["direction"] == "up"]
    for client in dict.fromkeys(row["client"] for row in rows):
        parts = []
        for row in (row for row in rows if row["client"] == client):
            what = _KINDS.get(row["kind"], f"{row['kind']} (keys and shares of the secure aggregation)")
            parts.append(f"{row['messages']} message{'s' if row['messages'] != 1 else ''} of {what}")
        sentences.append(f"{client} sent {', '.join(parts)}.")
    return sentences or ["Nothing: no message was sent."]


def _products(facts: Json) -> list[str]:
    return _recognised(facts) + _trained_products(facts["attacks"]["items"])


def _trained_products(rows: list[Json]) -> list[str]:
    """The strongest of the attacks on updates, by domain."""
    sentences = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        tried = [row for row in rows if row["domain"] == domain]
        row = max(tried, key=lambda row: row["auc"]["value"])
        by_chance = f", up to {_percent(row['random_updates'][-1])} by chance alone" if row["random_updates"] else ""
        sentences.append(
            f"{domain}: from what its training changed in the shared model, the strongest of {len(tried)} attacks tells a "
            f"product that its users took from one that they did not in {_percent(row['auc']['value'])} of cases "
            f"(guessing: 50 %{by_chance})."
        )
    return sentences


def _recognised(facts: Json) -> list[str]:
    rows = facts["attacks"]["linkage"]
    if not rows:
        used = [
            (domain, entry) for domain, entries in facts["perturbation"].items() for entry in entries if entry["used"]
        ]
        return [
            f"{domain}: somebody who has a list of candidate products would recognise "
            f"{_percent(entry['linkage_with_replacement'])} of them (simulated, not on recorded messages)."
            for domain, entry in used
        ] or ["No item vectors were sent, or none were attacked."]
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
        row = max(tried, key=lambda row: row["auc"]["value"])
        whom = "the shared model that every organisation gets" if row["client"] == GLOBAL else "its own update"
        auc, tpr = row["auc"], row["tpr"]
        better = "better than guessing" if auc["low"] > 0.5 else "not told from guessing by a test of this size"
        sentences.append(
            f"{domain}: in the strongest of {len(tried)} attacks tried (on {whom}, {_SCORES[row['score']]}) the attacker, "
            f"shown one person inside and one outside, names the right one in {_percent(auc['value'])} of cases (between "
            f"{_percent(auc['low'])} and {_percent(auc['high'])}; guessing: 50 %), which is {better}. Accusing one "
            f"outsider in a hundred wrongly, they find {_percent(tpr['value'])} of the insiders (guessing: 1 %)."
        )
    return sentences


_SCORES = {
    "loss": "by how well the model fits the person",
    "calibrated": "by comparison with models of the attacker's own",
}


def _guarantee(facts: Json) -> list[str]:
    sentences = []
    for row in facts["mechanisms"]:
        what = f"{row['client']}, {_KINDS.get(row['kind'], row['kind'])}"
        if row["standing"] == "guarantee":
            sentences.append(f"{what}: yes. {epsilon_words(row)}")
        elif row["standing"] == "hidden":
            sentences.append(
                f"{what}: the server sees the sum over organisations and no single update, if it follows the protocol."
            )
        elif row["standing"] == "heuristic":
            sentences.append(f"{what}: no. Noise is added, which is a heuristic and no guarantee.")
        else:
            sentences.append(f"{what}: no. They are sent as they are.")
    if any("simulation" in str(row["parameters"].get("secret", "")) for row in facts["mechanisms"]):
        sentences.append(
            "In this run the noise was derived from the run's seed: whoever knows the seed can remove it, so that what is said "
            "above holds for a simulation only. Set secret_dir to have each organisation draw its own."
        )
    return sentences or ["Nothing was sent, so none is needed."]


def epsilon_words(row: Json) -> str:
    """What an (epsilon, delta) means, with the neighbouring relation; ``row`` is a guarantee among the mechanisms."""
    epsilon, delta, neighbours = row["epsilon"], row["delta"], row["neighbours"]
    what = "a certain product is there" if row["protects"] == "item" else "a certain person took part"
    if not isinstance(epsilon, int | float) or not math.isfinite(epsilon):
        return "Differential privacy was configured without noise: epsilon is infinite, and nothing is promised."
    odds = math.exp(min(epsilon, 50.0))
    hollow = " So large an epsilon promises next to nothing." if epsilon > _LARGE_EPSILON else ""
    return (
        f"Differential privacy with epsilon {epsilon:.3g} at delta {delta:.1g}, where two data sets are neighbours if they "
        f"differ by {neighbours}: whatever the attacker knows, the messages of all rounds together raise the odds "
        f"that {what} by a factor of at most {odds:,.3g} (from 50 % to at most "
        f"{100 * odds / (1 + odds):.1f} %), except with a probability of {delta:.1g}. It does not cover what else is "
        f"published: metrics, logs, settings chosen by them.{hollow}"
    )


def _trust(facts: Json) -> list[str]:
    check = facts["self_check"]
    stands = (
        "Every number on what was sent was compared with the ledger and agrees."
        if check["holds"]
        else "No: the comparison with the ledger below found contradictions."
    )
    return [
        f"{stands} The ledger is a file in which every line carries the hash of the line before it. Whoever can write the file "
        "can write a new one as a whole: note the hash of its last line elsewhere to be able to tell. Attacks show what these "
        "attackers found, not what a cleverer one could find."
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"
