"""Send the metrics of each round to the run's loggers and print a line for it."""

from rich.console import Console

from lightning_sfubm.callbacks.dashboard import log_round
from lightning_sfubm.callbacks.progress import spent_words
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.loop import FederatedLoop


class RoundLogger(FederatedCallback):
    """Log every client's metrics after each round under ``fed/<client>/<metric>``, and print one and the spent privacy.

    The trainer adds one by itself; there is nothing to configure.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(quiet=quiet, highlight=False)

    def on_round_end(self, loop: FederatedLoop, round: int, metrics: dict[str, dict[str, float]]) -> None:
        """Log one point per client and metric, over the round."""
        log_round(loop.loggers, round, metrics)
        monitor = loop.federation.monitor
        shown = []
        for client, values in metrics.items():
            spent = spent_words(values)
            shown.append(f"{client} {values.get(monitor, float('nan')):.3f}{f' ({spent})' if spent else ''}")
        self._console.print(f"  round {round}/{loop.federation.rounds}: {monitor} {', '.join(shown)}", soft_wrap=True)

    def on_phase_end(self, loop: FederatedLoop, client: str, phase: str, best: float) -> None:
        """Print the best validation value of a local phase."""
        self._console.print(f"  local {phase}, {client}: best {loop.federation.monitor} {best:.3f}")
