"""What a dashboard shows of a federated run: rounds and clients, privacy figures, the result table.

Plain functions over a trainer's loggers. Any Lightning logger receives the numbers; a W&B run also receives tables and
the round as the axis of the federated curves. Two ``WandbLogger`` of one process share one run, so keys carry the
client's name and each run is written once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

Row = Mapping[str, Any]

PRIVACY_METRICS = ("cosine_mean", "obfuscation", "linkage_with_replacement", "linkage_without_replacement")


@rank_zero_only
def log_round(loggers: Iterable[Logger], round: int, client_metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Log the metrics of each client after a round as ``fed/<client>/<metric>``.

    Args:
        loggers: of the trainer.
        round: counts from 1; the x-axis of all ``fed/`` curves.
        client_metrics: metrics by client and name.
    """
    metrics = {
        f"fed/{client}/{name}": float(value)
        for client, named in sorted(client_metrics.items())
        for name, value in sorted(named.items())
    }
    for logger in _distinct(loggers):
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("fed/round", hidden=True)
            logger.experiment.define_metric("fed/*", step_metric="fed/round")
            logger.log_metrics({"fed/round": round, **metrics})
        else:
            logger.log_metrics({"fed/round": round, **metrics}, step=round)
        logger.save()


@rank_zero_only
def log_privacy(loggers: Iterable[Logger], privacy: Mapping[str, Sequence[Row]]) -> None:
    """Log the figures of the noise that was used as ``privacy/<domain>/<figure>``, and the sweep over sigma as a table.

    Args:
        loggers: of the trainer.
        privacy: per domain, one entry per sigma; the entry with a true ``used`` is the run's own.
    """
    metrics = {
        f"privacy/{domain}/{name}": float(entry[name])
        for domain, entries in privacy.items()
        for entry in entries
        if entry.get("used")
        for name in ("sigma", *PRIVACY_METRICS)
        if entry.get(name) is not None
    }
    rows = [
        {"domain": domain, **{key: value for key, value in entry.items() if not isinstance(value, Mapping)}}
        for domain, entries in privacy.items()
        for entry in entries
    ]
    _log(loggers, metrics, "privacy/sweep", rows)


@rank_zero_only
def log_results_table(loggers: Iterable[Logger], rows: Sequence[Row]) -> None:
    """Log the result table, and its numbers as ``results/<domain>/<method>/<metric>``.

    Args:
        loggers: of the trainer.
        rows: see :func:`lightning_sfubm.evaluation.facts.result_rows`; every row names ``domain`` and ``method``.
    """
    metrics = {
        f"results/{row['domain']}/{row['method']}/{name}": float(value)
        for row in rows
        for name, value in row.items()
        if isinstance(value, float)
    }
    _log(loggers, metrics, "results/table", rows)


def _log(loggers: Iterable[Logger], metrics: Mapping[str, float], table: str, rows: Sequence[Row]) -> None:
    for logger in _distinct(loggers):
        if metrics:
            logger.log_metrics(dict(metrics))
        if rows and isinstance(logger, WandbLogger):
            import wandb

            columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
            data = [[row.get(str(name)) for name in columns] for row in rows]
            logger.experiment.log({table: wandb.Table(columns=columns, data=data)})
        logger.save()


def _distinct(loggers: Iterable[Logger]) -> Iterator[Logger]:
    """The loggers, without those that write into a W&B run another one already writes into."""
    runs: set[int] = set()
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            if id(logger.experiment) in runs:
                continue
            runs.add(id(logger.experiment))
        yield logger
