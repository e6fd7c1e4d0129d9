"""Read a run folder. Whatever is missing or broken is noted in words; what is there is used.

Layout::

    config.yaml                     the resolved configuration
    run.json                        title, command, versions, hardware, commit, seed, times, comparisons, protocol
    data/<domain>.json              data card
    results/<domain>/<method>.parquet + .json
    history.jsonl                   one line per client and epoch: client, phase, round, epoch, metrics
    ledger.jsonl                    one line per federated message
    privacy.json                    per domain: one entry per sigma
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
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
    read_json,
    record,
    text,
)
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.federated.ledger import read_entry

Json = dict[str, Any]
#: what is read of run.json; an entry of another form is left out
_RUN: dict[str, Form] = {
    "domains": each(text),
    "comparisons": nullable(each(record({"a": text, "b": text}, {"domain": text}))),
    "reference_method": nullable(text),
    "timings": nullable(by_name(by_name(anything))),
    "notes": nullable(each(anything)),
    "protocol": nullable(by_name(anything)),
}
_EPOCH = record({"client": text, "metrics": by_name(anything)}, {"round": integer, "phase": text})
_AVERAGING = record({"uploads": each(number), "linkage": each(anything)})
_FIGURES = each(record({"sigma": number}, {"averaging": _AVERAGING}))


@dataclass
class RunFolder:
    """The content of a run folder.

    Attributes:
        path: the folder.
        run: ``run.json``.
        config: text of ``config.yaml``.
        cards: data card of each domain.
        results: per domain, results in the order of the table.
        history: epochs of all clients, in the order they ran.
        ledger: federated messages, in the order they were sent; lines that are no entries of a ledger are left out.
        unread: how many those are: with any, the ledger cannot be checked to its end.
        privacy: per domain, figures in rising sigma.
        problems: sentences about files that are there and cannot be used.
    """

    path: Path
    run: Json = field(default_factory=dict)
    config: str = ""
    cards: dict[str, Json] = field(default_factory=dict)
    results: dict[str, list[PerUserResults]] = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    ledger: list[Json] = field(default_factory=list)
    unread: int = 0
    privacy: dict[str, list[Json]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def domains(self) -> list[str]:
        """Domains in the order of ``run.json``, then those that only appear elsewhere."""
        return list(dict.fromkeys([*self.run.get("domains", []), *self.results, *self.cards, *self.privacy]))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """Read a folder.

        Raises:
            DataError: there is no such folder.
        """
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise DataError(f"{folder.path}: there is no such run folder.")
        folder.run = folder._fitting(folder.path / "run.json", lambda name: _RUN.get(name, anything))
        folder.config = folder._text(folder.path / "config.yaml")
        for file in sorted((folder.path / "data").glob("*.json")):
            if card := folder._json(file):
                folder.cards[file.stem] = card
        for file in sorted((folder.path / "results").glob("*/*.parquet")):
            try:
                result = PerUserResults.load(file)
            except DataError as error:
                folder.problems.append(str(error))
                continue
            folder.results.setdefault(file.parent.name, []).append(result)
        for rows in folder.results.values():
            rows.sort(key=lambda result: (result.meta.order, result.meta.method))
        folder.history = folder._epochs(folder.path / "history.jsonl")
        folder._read_ledger(folder.path / "ledger.jsonl")
        privacy = folder._fitting(folder.path / "privacy.json", lambda name: _averaged)
        folder.privacy = {
            domain: sorted(entries, key=lambda entry: entry["sigma"]) for domain, entries in privacy.items() if entries
        }
        return folder

    def _text(self, file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{file}: cannot be read ({error}).")
            return ""

    def _json(self, file: Path) -> Json | None:
        text = self._text(file)
        if not text:
            return None
        try:
            value = read_json(text)
        except json.JSONDecodeError as error:
            self.problems.append(f"{file}: broken JSON in line {error.lineno} ({error.msg}).")
            return None
        except ValueError as error:  # numbers or nesting beyond all measure
            self.problems.append(f"{file}: not the JSON this product writes ({error}).")
            return None
        if not isinstance(value, dict):
            self.problems.append(f"{file}: expected a JSON object, found {type(value).__name__}.")
            return None
        return value

    def _fitting(self, file: Path, form: Callable[[str], Form]) -> Json:
        """The entries of a file that are of their form; the others are left out and noted."""
        fitting = {}
        for name, value in (self._json(file) or {}).items():
            if (wrong := form(name)(value, name)) is None:
                fitting[name] = value
            else:
                self.problems.append(f"{file}: {wrong}; '{name}' is left out.")
        return fitting

    def _epochs(self, file: Path) -> list[Json]:
        """JSON lines; a line that is broken (a run may have been killed while writing) is left out and noted."""
        rows = []
        for place, line in enumerate(self._text(file).splitlines(), 1):
            try:
                row = read_json(line)
                wrong = _EPOCH(row, "")
            except ValueError:
                wrong = "it is no JSON"
            if wrong is None:
                rows.append(row)
            else:
                self.problems.append(f"{file}: line {place} is not an object with client, metrics ({wrong}); left out.")
        return rows

    def _read_ledger(self, file: Path) -> None:
        """Lines that pass the ledger's own check of their form; what is left out must not make the run look better."""
        try:
            lines = file.read_bytes().splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            self.problems.append(f"{file}: cannot be read ({error}).")
            return
        wrong = []
        for place, line in enumerate(lines, 1):
            entry = read_entry(line)
            try:
                if entry is None:
                    raise ValueError("no entry")
                self.ledger.append(read_json(line))
            except ValueError:
                wrong.append(place)
        self.unread = len(wrong)
        if wrong:
            which = f"line {wrong[0]} is" if len(wrong) == 1 else f"lines {', '.join(map(str, wrong[:5]))} are"
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            self.problems.append(
                f"{file}: {which} not an entry of a ledger{more} and left out: the ledger cannot be checked to its end, and "
                "more may have left than is told here. Put back the file that the run has written."
            )


def _averaged(value: Any, where: str) -> str | None:
    """Figures by sigma, with as many shares linked by the averaging attack as it has numbers of uploads."""
    if (wrong := _FIGURES(value, where)) is not None:
        return wrong
    for place, entry in enumerate(value):
        attack = entry.get("averaging")
        if attack and len(attack["uploads"]) != len(attack["linkage"]):
            return f"{where}[{place}].averaging has not as many entries in linkage as in uploads"
    return None
