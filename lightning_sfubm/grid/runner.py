"""Run a grid: finished cells are skipped, an interrupted run goes on, a failed one is named at the end."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from lightning_sfubm.errors import CheckpointError, ConfigError, DataError
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.evaluation.results import PerUserResults, write_atomically
from lightning_sfubm.federated.checkpoint import find_state, stored_states
from lightning_sfubm.grid.cells import cell_path, read_cell, write_cell
from lightning_sfubm.grid.named_files import named_models
from lightning_sfubm.grid.spec import Grid, Run, cell_hash, values_of
from lightning_sfubm.locks import locked

KEPT = ("checkpoints", "results", "local")  #: folders of a run that it goes on from: states, rows, twins trained alone
MARK = "grid_run.json"  #: in a run's folder: what its rows were computed from, by which code, on which machine


def data_configs(run: Run, of_pair: int) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The configuration files and flags of a run that say what data it is of: its pair's, and further ones that touch ``data``.

    Args:
        run: of the grid.
        of_pair: how many of its files are the pair's.
    """
    touching = tuple(path for path in run.configs[of_pair:] if _touches_data(values_of(path)))
    flags = run.flags if any(flag.startswith(("--data", "--config", "-c")) for flag in run.flags) else ()
    return (*run.configs[:of_pair], *touching), flags


def _touches_data(values: Any) -> bool:
    return isinstance(values, dict) and any(str(key).partition(".")[0] == "data" for key in values)


def sources(configs: tuple[Path, ...], flags: tuple[str, ...], root: str | None) -> dict[str, str]:
    """Hash of the data that each domain of a run is read from.

    Args:
        configs: configuration files.
        flags: further options.
        root: data root.

    Raises:
        ConfigError: the configuration has no domains.
    """
    from lightning_sfubm.cli import SFUBMCLI

    arguments = [*(item for config in configs for item in ("--config", str(config))), *flags]
    arguments += ["--data.root", root] if root else []
    logging.getLogger("lightning").setLevel(logging.ERROR)  # nothing is trained here: no word on devices and seeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        domains = getattr(SFUBMCLI(args=arguments, run=False).datamodule, "domains", None)
    if not domains:
        raise ConfigError(f"{configs[-1]} has no data.domains; a grid needs a federated experiment")
    return {name: domain.source_fingerprint() for name, domain in domains.items()}


def run_grid(
    grid: Grid, out: Path, root: str | None, only: list[str], budget_s: float | None, jobs: int = 1
) -> list[str]:
    """Compute every missing cell.

    Args:
        grid: what to run.
        out: folder of runs and cells.
        root: data root.
        only: patterns of ``pair/run/seed``.
        budget_s: wall-clock seconds after which no run is started and those at work are stopped; they go on next time.
        jobs: runs at a time. With more than one the threads of the machine are shared out among them, unless
            ``OMP_NUM_THREADS`` is set: a run's sums, and so its last digits, can depend on its number of threads.

    Returns:
        Keys of the runs that are not complete.

    Raises:
        ConfigError: ``jobs`` is below 1.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least one run has to be at work")
    console, started = Console(highlight=False), time.monotonic()
    chosen = grid.select(only)
    parts = {run.key: data_configs(run, len(grid.pairs[run.pair])) for run in chosen}
    data = {part: sources(*part, root) for part in dict.fromkeys(parts.values())}
    shared = os.environ if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}

    def compute(number: int, run: Run) -> bool:
        # Read once: what is edited while the run is at work is not what its cells were computed with.
        here, settings, name = data[parts[run.key]], run.settings_hash(), f"{number}/{len(chosen)} {run.key}"
        key = cell_hash(settings, here | named_models(run.configs, run.flags))
        if _can_go_on(out / "runs" / run.key / "checkpoints"):
            # Rows whose cells are gone, or that a killed run had not made cells of: those of the commit and machine that
            # computed them.
            _export(run, out, key, settings)
        missing = _missing(run, out, list(here), key)
        if not missing:
            console.print(f"[dim]{name}: done before[/dim]")
            return True
        left = None if budget_s is None else budget_s - (time.monotonic() - started)
        if left is not None and left <= 0:
            return False
        console.print(f"[bold]{name}[/bold]: {', '.join(missing)}")
        before = time.monotonic()
        problem = _process(run, out / "runs" / run.key, root, key, left, shared, at_work)
        _export(run, out, key, settings)
        done = not _missing(run, out, list(here), key)
        console.print(f"{name}: {'done' if done else 'not complete'} after {time.monotonic() - before:.0f} s{problem}")
        return done

    with ThreadPoolExecutor(jobs) as pool, _ended_together() as at_work:  # each thread waits for the process of a run
        done = list(pool.map(compute, range(1, len(chosen) + 1), chosen))
    return [run.key for run, whole in zip(chosen, done, strict=True) if not whole]


def _missing(run: Run, out: Path, domains: list[str], key: str) -> list[str]:
    """Methods of a run that lack a cell in some domain."""
    missing = []
    for row, method in run.rows.items():
        paths = [cell_path(out, run.pair, domain, method, run.seed) for domain in domains]
        if not all(_is_current(read_cell(path), key, row) for path in paths):
            missing.append(method)
    return missing


def _is_current(cell: dict[str, Any] | None, key: str, row: str) -> bool:
    """Whether a cell is of these settings, data and row: the only row of a variant gives its place to another one."""
    return cell is not None and cell.get("grid_hash") == key and cell.get("row", row) == row


def _arguments(run: Run, root: str | None, folder: Path) -> list[str]:
    """Options of the ``fit`` that computes a run."""
    arguments = [item for config in run.configs for item in ("--config", str(config))]
    arguments += ["--seed_everything", str(run.seed), "--model.init_args.seed", str(run.seed), *run.flags]
    arguments += ["--trainer.default_root_dir", str(folder)]
    arguments += ["--experiment.init_args.methods", json.dumps(list(run.rows))]
    return arguments + (["--data.root", root] if root else [])


@contextmanager
def _ended_together() -> Iterator[set[subprocess.Popen[bytes]]]:
    """Processes that end with this one where it is told to end: a run would go on unseen, and hold its folder's lock.

    Yields:
        Set to which a process at work is added, and from which a finished one is taken.
    """
    at_work: set[subprocess.Popen[bytes]] = set()

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # Python lets no other thread listen for signals
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP) if in_main}
    try:
        yield at_work
    except BaseException:
        for process in list(at_work):
            process.kill()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _process(
    run: Run,
    folder: Path,
    root: str | None,
    key: str,
    timeout: float | None,
    variables: Mapping[str, str],
    at_work: set[subprocess.Popen[bytes]],
) -> str:
    """One ``fit`` in a process of its own: memory is measured per run, and a crash ends that run alone.

    Args:
        run: of the grid.
        folder: of the run.
        root: data root.
        key: its grid hash.
        timeout: seconds after which it is stopped.
        variables: environment of the process.
        at_work: holds the process while it runs.

    Returns:
        What went wrong, for the terminal.
    """
    mark = folder / MARK
    resumable = _mark_of(mark) == key and _can_go_on(folder / "checkpoints")
    if not resumable:  # what lies here is of other settings, data or code, and must not be taken for this run's
        try:
            with locked(folder, "--out"):  # a fit may have outlived the command that started it
                shutil.rmtree(folder, ignore_errors=True)
        except ConfigError as error:
            return f"; {error}"
    arguments = _arguments(run, root, folder)
    if resumable and any((folder / kept).exists() for kept in KEPT):
        arguments += ["--ckpt_path", "last"]
    facts = environment()
    threads = variables.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdigit():  # those of the run, not of this process
        facts["hardware"]["threads"] = int(threads)
    about = {"grid_hash": key, **{name: facts[name] for name in ("commit", "hardware", "versions")}}
    write_atomically(mark, json.dumps(about).encode())
    command = [sys.executable, "-m", "lightning_sfubm", "fit", *arguments]
    with (folder / "output.log").open("a", encoding="utf-8") as log:
        log.write(f"$ lightning-sfubm fit {' '.join(arguments)}\n")
        log.flush()
        with subprocess.Popen(command, stdout=log, stderr=log, env=variables) as fit:
            at_work.add(fit)
            try:
                code = fit.wait(timeout)
            except subprocess.TimeoutExpired:
                log.write("stopped: the budget is used up\n")
                return ""
            finally:
                fit.kill()
                at_work.discard(fit)
    if not code:
        return ""
    tail = (folder / "output.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
    return f"; exit code {code}: {' '.join(tail)} ({folder / 'output.log'})"


def _can_go_on(states: Path) -> bool:
    """Whether there is a state that this version reads, or none at all: then the run starts from the beginning."""
    if not stored_states(states):
        return True
    try:
        find_state(states)
    except CheckpointError:
        return False
    return True


def _mark_of(mark: Path) -> str | None:
    """The grid hash a run folder was marked with; a mark that cannot be read is none, and the run starts again."""
    try:
        return str(json.loads(mark.read_text(encoding="utf-8"))["grid_hash"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _export(run: Run, out: Path, key: str, settings: str) -> None:
    """Cells of the rows that are there, those of an interrupted run among them."""
    folder = out / "runs" / run.key
    if _mark_of(folder / MARK) != key:
        return  # what lies there is another run's
    about: dict[str, Any] = json.loads((folder / MARK).read_text(encoding="utf-8"))
    about |= {"pair": run.pair, "run": run.name, "settings_hash": settings}
    about["command"] = "lightning-sfubm fit " + " ".join(_arguments(run, "DIR", Path("RUN")))
    for row, method in run.rows.items():
        for file in sorted((folder / "results").glob(f"*/{row}.parquet")):
            domain = file.parent.name  # "<domain>, all users" is a table of its own
            path = cell_path(out, run.pair, domain, method, run.seed)
            if _is_current(read_cell(path), key, row):
                continue
            try:
                result = PerUserResults.load(file)
            except DataError:
                continue  # torn: computed again
            result.meta.domain = domain
            label = run.labels.get(method, result.meta.label)
            write_cell(path, result, {**about, "method": method, "label": label, "row": row})
