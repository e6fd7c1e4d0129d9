"""Several clients, one experiment: a logger that prefixes keys with the client's name."""

from argparse import Namespace
from typing import Any

from lightning.pytorch.loggers import Logger


class PrefixedLogger(Logger):
    """Pass metrics on to another logger under ``<prefix>/<name>``. It never finalizes that logger: the run goes on.

    Args:
        logger: the shared logger (two W&B loggers in a process would share one run anyway).
        prefix: the client's name.
    """

    def __init__(self, logger: Logger, prefix: str) -> None:
        super().__init__()
        self._logger, self._prefix = logger, prefix

    @property
    def name(self) -> str | None:
        """Name of the shared logger."""
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        """Version of the shared logger."""
        return self._logger.version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log under the prefix; the client's own step travels as a metric, the shared logger keeps its order."""
        prefixed = {f"{self._prefix}/{name}": value for name, value in metrics.items()}
        if step is not None:
            prefixed[f"{self._prefix}/step"] = float(step)
        self._logger.log_metrics(prefixed)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: each client's hyper-parameters are those of the run's config."""
