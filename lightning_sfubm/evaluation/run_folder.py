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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.results import PerUserResults

Json = dict[str, Any]


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
        ledger: federated messages, in the order they were sent.
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
        folder.run = folder._json(folder.path / "run.json", dict) or {}
        folder.config = folder._text(folder.path / "config.yaml")
        for file in sorted((folder.path / "data").glob("*.json")):
            if card := folder._json(file, dict):
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
        folder.history = folder._lines(folder.path / "history.jsonl", ("client", "metrics"))
        folder.ledger = folder._lines(folder.path / "ledger.jsonl", ("client", "direction", "bytes"))
        privacy = folder._json(folder.path / "privacy.json", dict) or {}
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

    def _json(self, file: Path, kind: type) -> Any:
        text = self._text(file)
        if not text:
            return None
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            self.problems.append(f"{file}: broken JSON in line {error.lineno} ({error.msg}).")
            return None
        except (ValueError, RecursionError):  # numbers or nesting beyond all measure
            self.problems.append(f"{file}: not the JSON this product writes.")
            return None
        if not isinstance(value, kind):
            self.problems.append(f"{file}: expected a JSON object, found {type(value).__name__}.")
            return None
        return value

    def _lines(self, file: Path, required: tuple[str, ...]) -> list[Json]:
        """JSON lines; a line that is broken (a run may have been killed while writing) is left out and noted."""
        rows = []
        for number, line in enumerate(self._text(file).splitlines(), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and all(key in row for key in required):
                rows.append(row)
            else:
                self.problems.append(f"{file}: line {number} is not an object with {', '.join(required)}; left out.")
        return rows
