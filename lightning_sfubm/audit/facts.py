"""The facts of the privacy report, as JSON values: what ``privacy_report.json`` holds."""

from pathlib import Path
from typing import Any

from lightning_sfubm.audit.check import Check, check_run
from lightning_sfubm.audit.forms import AUDIT, read_formed
from lightning_sfubm.audit.forms import CURVE as CURVE_FORM
from lightning_sfubm.audit.guarantee import content_of, coverage, guarantee, mechanism_of, simulated
from lightning_sfubm.audit.replay import GLOBAL
from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.facts import ledger_facts, plain
from lightning_sfubm.evaluation.forms import Form
from lightning_sfubm.evaluation.run_folder import Json, RunFolder
from lightning_sfubm.federated.recording import FOLDER, MessageStore

CURVE = "privacy_curve.json"
_GUARANTEE = ("mechanism", "epsilon", "delta", "neighbours", "adversary", "protects")
_ATTACKS = ("linkage", "attribute", "membership", "items", "answers")


def privacy_facts(folder: RunFolder) -> Json:
    """Everything the privacy report states.

    Args:
        folder: of a finished run; ``audit.json`` and ``privacy_curve.json`` are read from it where they are there.
    """
    check = check_run(folder.path)
    audit = _read(folder.path / "audit.json", AUDIT, folder.problems) or {}
    communication = ledger_facts(folder.ledger, folder.unread)
    attacks = {name: audit.get(name) or [] for name in _ATTACKS}
    for name in ("membership", "items"):
        attacks[name] = [{**row, "simulated": rests_on_seed(folder.ledger, row["client"])} for row in attacks[name]]
    doubts = check.problems or check.unchecked
    if folder.unread and not check.problems:  # a line can have the form and yet be none that is ever written
        doubts = [f"lines of the ledger that cannot be read: {folder.unread}", *doubts]
    facts: Json = {
        "run": {name: folder.run.get(name) for name in ("title", "command", "started", "finished")},
        "ledger": {"file": "ledger.jsonl", "lines": check.lines, "bytes": check.bytes, "head": check.head},
        "self_check": _self_check(folder, check, communication, audit),
        "communication": communication,
        "mechanisms": mechanisms(folder.ledger, established=not doubts),
        "guarantee": guarantee(folder.ledger, doubts),
        "attacks": {**attacks, "not_run": audit.get("not_run") or []},
        "audit": {name: audit.get(name) for name in ("started", "commit", "command", "settings")} if audit else None,
        "perturbation": folder.privacy,
        "curve": _read(folder.path / CURVE, CURVE_FORM, folder.problems) or [],
        "problems": folder.problems,
    }
    return plain(facts)  # type: ignore[no-any-return]


def mechanisms(ledger: list[Json], established: bool = True) -> list[Json]:
    """What protected each kind of message that went up, by client, with its parameters at the last message.

    ``standing`` is ``"guarantee"`` where a bound holds against its ``adversary`` (words; ``None`` where the ledger names none),
    ``"simulated"`` where one would if its noise did not follow from the run's seed, ``"unproven"`` where some messages state
    one that does not cover all of the client's or is not known to, ``"hidden"`` where the server sees sums alone,
    ``"heuristic"`` where noise hides without a bound, and ``"none"``.

    Args:
        ledger: its lines.
        established: whether the ledger is known to be whole; where it is not, no bound is a guarantee.
    """
    rows: dict[tuple[str, str], Json] = {}
    bound = {(row["client"], row["protects"]) for row in coverage(ledger) if row["bound"] and established}
    for line in ledger:
        whose = content_of(line)
        if line["direction"] != "up" or whose is None:
            continue
        stated = mechanism_of(line)
        kind = line.get("kind", "")
        common = {"client": line["client"], "kind": kind}
        privacy, secure = stated.get("differential privacy"), stated.get("secure aggregation")
        privacy = privacy if isinstance(privacy, dict) else None
        if privacy:
            covered = "simulated" if simulated(privacy) else "guarantee"
            private = common | {"standing": covered if (line["client"], whose) in bound else "unproven"}
            private["mechanism"] = privacy.get("mechanism", "differential privacy")
            rows[line["client"], f"{kind} dp"] = private | {
                "epsilon": privacy.get("epsilon"),
                "delta": privacy.get("delta"),
                "neighbours": privacy.get("neighbours"),
                "adversary": privacy.get("adversary"),
                "protects": privacy.get("protects", "user"),
                "parameters": {k: v for k, v in privacy.items() if k not in _GUARANTEE},
            }
        if secure:
            hidden = common | {"standing": "hidden", "mechanism": "secure aggregation", "parameters": {"": secure}}
            rows[line["client"], f"{kind} secure"] = hidden
        if "sigma" in stated and not (privacy or (secure and not stated["sigma"])):  # the strongest standing is told
            rows[line["client"], f"{kind} noise"] = common | {
                "standing": "heuristic" if stated["sigma"] else "none",
                "mechanism": stated.get("mechanism", ""),
                "parameters": {k: v for k, v in stated.items() if k != "mechanism"},
            }
        elif not privacy and not secure:
            rows[line["client"], f"{kind} none"] = common | {
                "standing": "none",
                "mechanism": "none",
                "parameters": stated,
            }
    return [rows[key] for key in sorted(rows)]


def rests_on_seed(ledger: list[Json], client: str) -> bool:
    """Whether a bound for users, beside an attack on a client's messages, has noise that follows from the run's seed.

    Args:
        ledger: its lines.
        client: whose messages are attacked; :data:`~lightning_sfubm.audit.replay.GLOBAL` = those of all.
    """
    lines = [line for line in ledger if client in (line["client"], GLOBAL) and content_of(line) == "user"]
    stated = [mechanism_of(line).get("differential privacy") for line in lines]
    return any(isinstance(privacy, dict) and simulated(privacy) for privacy in stated)


def last_membership(facts: Json) -> list[Json]:
    """Membership figures of the last message of each client, and of the last aggregated teacher."""
    rows: dict[tuple[str, str, str], Json] = {}
    for row in facts["attacks"]["membership"]:
        key = (row["domain"], row["client"], row["score"])
        if key not in rows or row["round"] >= rows[key]["round"]:
            rows[key] = row
    return sorted(rows.values(), key=lambda row: (row["domain"], row["client"] == GLOBAL, row["score"]))


def _self_check(folder: RunFolder, check: Check, communication: Json, audit: Json) -> Json:
    """The report's own numbers against the ledger, counted on two ways; ``None`` = there is nothing to compare.

    ``holds`` of all is ``False`` where something disagrees, and ``None`` where the end of the ledger could not be checked.
    """
    resent = [line for line in folder.ledger if line.get("resent")]
    messages = sum(row["messages"] for row in communication["rows"]) + len(resent)
    total = sum(row["bytes"] for row in communication["rows"]) + sum(line["bytes"] for line in resent)
    stated = sum(check.bytes.values())
    kept = bool(MessageStore(folder.path / FOLDER).names())
    lines, unread = check.lines, folder.unread
    left_out = f" checked, {unread} left out, for they cannot be read" if unread else ""
    attacked = "no audit was made"
    if audit.get("check"):
        attacked = "by the hash of the last line"
    elif (folder.path / "audit.json").is_file():
        attacked = "audit.json does not say it, or cannot be used"
    broken = bool(check.problems or unread)
    rows: list[Json] = [
        {
            "what": "The ledger is whole: every line follows the one before it, and none is missing at the end",
            "holds": False if broken else None if check.unchecked else True,
            "detail": "; ".join([f"{lines} lines, sha256 of the last {check.head[:16]}…", *check.unchecked]),
        },
        {
            "what": "The messages of this report are those of the ledger, no more and no fewer",
            "holds": messages == lines and not unread,
            "detail": f"{messages} in the table (with {len(resent)} sent again), {lines} lines{left_out}",
        },
        {
            "what": "The bytes of this report add up to those of the ledger",
            "holds": total == stated and not unread,
            "detail": f"{total:,} in the table, {stated:,} in the ledger",
        },
        {
            "what": "The recorded messages have the hash and the size of their lines",
            "holds": check.recorded == lines if kept else None,
            "detail": f"{check.recorded} of {lines}" if kept else "the run kept hashes only",
        },
        {
            "what": "The attacks were made on the messages of this ledger",
            "holds": audit["check"]["head"] == check.head and not audit["check"]["problems"]
            if audit.get("check")
            else None,
            "detail": attacked,
        },
    ]
    holds = False if any(row["holds"] is False for row in rows) else rows[0]["holds"]
    return {"holds": holds, "rows": rows, "problems": check.problems, "unchecked": check.unchecked}


def _read(path: Path, form: Form, problems: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return read_formed(path, form)
    except DataError as error:
        problems.append(f"{error}; left out. Run 'lightning-sfubm audit' again.")
        return None
