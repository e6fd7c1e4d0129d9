"""The declarative file behind a results table: which runs there are, and which rows each contributes."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.grid.named_files import named_files
from lightning_sfubm.names import path_part

_GRID_KEYS = {"title", "pairs", "runs", "comparisons"}
_RUN_KEYS = {"rows", "seeds", "config", "flags", "pairs"}
#: settings of a domain, with the value that says what was done before there was a choice; the default is another one
_BEFORE = {"even_batches": False}


@dataclass(frozen=True)
class Run:
    """One process of the grid: a pair of domains, a variant of its configuration, a seed.

    Attributes:
        pair: name of the pair.
        name: name of the variant.
        seed: root seed.
        configs: configuration files, later ones on top of earlier ones.
        flags: further options of ``lightning-sfubm fit``.
        rows: row of the experiment -> name of the method in the table.
        labels: name of the method -> what the table prints; where missing, the row's own label.
    """

    pair: str
    name: str
    seed: int
    configs: tuple[Path, ...]
    flags: tuple[str, ...]
    rows: dict[str, str]
    labels: dict[str, str]

    @property
    def key(self) -> str:
        """``pair/name/seed``: what ``--only`` selects by, and the run's folder."""
        return f"{self.pair}/{self.name}/{self.seed}"

    def settings_hash(self) -> str:
        """Configuration files, settings files they name, options and seed alone.

        Tells a table, which has no data at hand, what is out of date. Of a configuration its values count, without the
        methods that it would compute by itself: comments, layout and one more row make no cell out of date. Nor does a setting
        that every domain has as everything was before there was one (:data:`_BEFORE`).
        """
        configs = [values_of(path) for path in self.configs]
        silent: list[str] = []
        for name, value in _BEFORE.items():
            said = any(name in flag for flag in self.flags)
            found = _by_domain(configs, name)
            if not said and found and all(values and set(values) == {value} for values in found.values()):
                configs = _without(configs, name)
            elif not said and found and not any(found.values()):
                silent.append(name)  # where nothing is said the default holds, which is not what was done before
        parts: list[Any] = [configs, self.flags, self.seed, *([{"default": silent}] if silent else [])]
        if named := named_files(self.configs, self.flags):
            parts.append(named)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cell_hash(settings: str, sources: dict[str, str]) -> str:
    """Of the settings of a run (:meth:`Run.settings_hash`) and the content of its data and of the local models it names."""
    return hashlib.sha256(json.dumps([settings, sources], sort_keys=True).encode()).hexdigest()


def values_of(config: Path) -> Any:
    """Values of a configuration without ``experiment.init_args.methods``, in whose place a run's rows stand.

    Raises:
        ConfigError: it is not there, or not readable YAML.
    """
    import yaml

    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{config} is not there") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"{config} is not readable YAML: {' '.join(str(error).split())}") from error
    with suppress(TypeError, KeyError, AttributeError):  # none named
        del values["experiment"]["init_args"]["methods"]
    return values


def _by_domain(configs: list[Any], name: str) -> dict[str, list[Any]]:
    """What the configurations say of a setting in each of their domains."""
    found: dict[str, list[Any]] = {}
    for domains in _found(configs, "domains"):
        for domain, entry in domains.items() if isinstance(domains, dict) else ():
            found.setdefault(str(domain), []).extend(_found(entry, name))
    return found


def _found(values: Any, name: str) -> list[Any]:
    """All values under a name, however deep it stands."""
    if isinstance(values, dict):
        return [v for key, value in values.items() for v in ([value] if key == name else _found(value, name))]
    return [v for value in values for v in _found(value, name)] if isinstance(values, list) else []


def _without(values: Any, name: str) -> Any:
    """The same without the entries of a name."""
    if isinstance(values, dict):
        return {key: _without(value, name) for key, value in values.items() if key != name}
    return [_without(value, name) for value in values] if isinstance(values, list) else values


@dataclass(frozen=True)
class Grid:
    """All runs of a results table, in the order they are run.

    Attributes:
        title: heading of the table.
        pairs: name -> configuration files, later ones on top of earlier ones.
        runs: see :class:`Run`.
        comparisons: pairs of methods whose paired difference the table states.
    """

    title: str
    pairs: dict[str, tuple[Path, ...]]
    runs: tuple[Run, ...]
    comparisons: tuple[tuple[str, str], ...]

    def settings(self) -> dict[tuple[str, str, int], str]:
        """:meth:`Run.settings_hash` of every cell of the grid, by pair, method and seed."""
        hashes = [run.settings_hash() for run in self.runs]
        return {(r.pair, m, r.seed): key for r, key in zip(self.runs, hashes, strict=True) for m in r.rows.values()}

    def rows(self) -> dict[tuple[str, str, int], str]:
        """Which row of the experiment every cell of the grid is, by pair, method and seed."""
        return {(run.pair, method, run.seed): row for run in self.runs for row, method in run.rows.items()}

    def labels(self) -> dict[str, str]:
        """What the grid says the table prints, by method; the others have the label they were computed with."""
        return {method: label for run in self.runs for method, label in run.labels.items()}

    def select(self, only: list[str]) -> list[Run]:
        """Runs whose key matches one of the patterns; all where there are none.

        Raises:
            ConfigError: a pattern matches nothing.
        """
        for pattern in only:
            if not any(fnmatch(run.key, pattern) for run in self.runs):
                known = ", ".join(sorted({run.key for run in self.runs})[:6])
                raise ConfigError(f"--only {pattern} matches no run of the grid; runs are called {known} ...")
        return [run for run in self.runs if not only or any(fnmatch(run.key, pattern) for pattern in only)]


def load_grid(path: Path, known_rows: set[str]) -> Grid:
    """Read and check a grid file. Paths in it are relative to the working directory, as those of ``--config``.

    Args:
        path: the YAML file.
        known_rows: rows an experiment can compute.

    Raises:
        ConfigError: naming the file and the entry that is missing, unknown or of the wrong kind.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"grid {path} is not there") from None
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"grid {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"pairs", "runs"} <= content.keys():
        raise ConfigError(f"grid {path} needs the entries 'pairs' and 'runs'")
    _check_keys(path, "", content, _GRID_KEYS)
    pairs = {
        name: tuple(_existing(path, f"pairs.{name}", file) for file in _as_list(files))
        for name, files in _named(path, "pairs", content["pairs"]).items()
    }
    if empty := [name for name, files in pairs.items() if not files]:
        raise ConfigError(f"grid {path}: pairs.{empty[0]} names no configuration file")
    runs: list[Run] = []
    for name, entry in _named(path, "runs", content["runs"]).items():
        if not isinstance(entry, dict) or not entry.get("rows"):
            raise ConfigError(f"grid {path}: runs.{name} needs 'rows'")
        where = f"runs.{name}."
        _check_keys(path, where, entry, _RUN_KEYS)
        rows, labels = _rows(path, name, entry["rows"], known_rows)
        overlays = [_existing(path, f"{where}config", file) for file in _as_list(entry.get("config"))]
        flags, seeds = _flags(path, where, entry.get("flags")), _seeds(path, where, entry.get("seeds"))
        for pair in _as_list(entry.get("pairs")) or list(pairs):
            if not isinstance(pair, str) or pair not in pairs:
                raise ConfigError(f"grid {path}: {where}pairs names '{pair}'; pairs are {', '.join(pairs)}")
            runs += [Run(pair, name, seed, (*pairs[pair], *overlays), flags, rows, labels) for seed in seeds]
    _each_cell_once(path, runs)
    methods = {method for run in runs for method in run.rows.values()}
    comparisons = _comparisons(path, content.get("comparisons"), methods)
    title = content.get("title")
    if not isinstance(title, str | int | float | None):
        raise ConfigError(f"grid {path}: title must be text, not {title!r}")
    return Grid(path.stem if title is None else str(title), pairs, tuple(runs), comparisons)


def _named(path: Path, where: str, entries: Any) -> dict[str, Any]:
    """A mapping by names that folders can be called by: a run's lies at ``out/runs/<pair>/<run>/<seed>``."""
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"grid {path}: {where} must be a mapping by name with at least one entry, not {entries!r}")
    return {path_part(name, f"grid {path}: {where}"): entry for name, entry in entries.items()}


def _seeds(path: Path, where: str, value: Any) -> list[int]:
    seeds = _as_list(value) or [1]
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ConfigError(f"grid {path}: {where}seeds names {seed!r}; a seed is an integer from 0 to {2**32 - 1}")
    return seeds


#: options that are the grid's own, without ``init_args``, and what to give instead
_OF_GRID = {
    "--seed_everything": "name the seeds under 'seeds'",
    "--model.seed": "name the seeds under 'seeds'",
    "--experiment.methods": "name the rows under 'rows'",
    "--trainer.default_root_dir": "give --out to the command",
    "--ckpt_path": "an interrupted run goes on of itself",
}


def _flags(path: Path, where: str, value: Any) -> tuple[str, ...]:
    flags = _as_list(value)
    for flag in flags:
        if not isinstance(flag, str | int | float):
            raise ConfigError(f"grid {path}: {where}flags holds {flag!r}; it is a list of options and values in quotes")
    if flags and not str(flags[0]).startswith("--"):
        raise ConfigError(
            f"grid {path}: {where}flags starts with {flags[0]!r}; it is a list that starts with an option"
        )
    for flag in flags:
        if (name := str(flag).partition("=")[0].replace(".init_args", "")) in _OF_GRID:
            raise ConfigError(f"grid {path}: {where}flags holds {name}, which the grid sets itself: {_OF_GRID[name]}")
    return tuple(str(flag) for flag in flags)


def _comparisons(path: Path, value: Any, methods: set[str]) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list | None):
        raise ConfigError(f"grid {path}: comparisons must be a list of pairs of methods, not {value!r}")
    for pair in value or []:
        named = isinstance(pair, list) and len(pair) == 2 and all(isinstance(m, str) and m in methods for m in pair)
        if not named:
            raise ConfigError(f"grid {path}: comparison {pair!r} must name two of its methods: {sorted(methods)}")
    return tuple((first, second) for first, second in value or [])


def _each_cell_once(path: Path, runs: list[Run]) -> None:
    """A variant's only row is called like the variant; called like a method, its cells would replace that method's."""
    owners: dict[tuple[str, str, int], str] = {}
    for run in runs:
        for method in run.rows.values():
            other = owners.setdefault((run.pair, method, run.seed), run.name)
            if other != run.name:
                raise ConfigError(
                    f"grid {path}: runs.{other} and runs.{run.name} both compute the row '{method}' of seed {run.seed}; "
                    "rename one of them"
                )


def _rows(path: Path, run: str, rows: Any, known: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Rows of a run by method name, and labels. A list keeps the rows' names; a mapping row -> label is a variant."""
    if not isinstance(rows, list | dict):
        raise ConfigError(
            f"grid {path}: runs.{run}.rows must be a list of rows, or a mapping of rows to their labels, not {rows!r}"
        )
    unknown = [row for row in rows if not isinstance(row, str) or row not in known]
    if unknown:
        raise ConfigError(f"grid {path}: runs.{run}.rows names {unknown}; known rows are {', '.join(sorted(known))}")
    if isinstance(rows, list):
        return {row: row for row in rows}, {}
    names = {row: run if len(rows) == 1 else f"{run}.{row}" for row in rows}
    return names, {names[row]: str(label) for row, label in rows.items()}


def _check_keys(path: Path, where: str, entry: dict[str, Any], known: set[str]) -> None:
    for key in entry:
        if key not in known:
            raise ConfigError(f"grid {path}: unknown entry '{where}{key}'; known are {', '.join(sorted(known))}")


def _existing(path: Path, where: str, file: Any) -> Path:
    if not isinstance(file, str) or not os.path.isfile(file):  # which takes whatever text for a name
        raise ConfigError(f"grid {path}: {where} names {file}, which is not there")
    return Path(file)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
