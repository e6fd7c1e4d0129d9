"""Send the metrics of each round to the run's loggers."""

from lightning_sfubm.callbacks.dashboard import log_round
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.loop import FederatedLoop


class RoundLogger(FederatedCallback):
    """Log the validation metrics of every client after each round under ``fed/<client>/<metric>``.

    The trainer adds one by itself; there is nothing to configure.
    """

    def on_round_end(self, loop: FederatedLoop, round: int, metrics: dict[str, dict[str, float]]) -> None:
        """Log one point per client and metric, over the round."""
        log_round(loop.loggers, round, metrics)
