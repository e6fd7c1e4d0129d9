"""Adaptive server optimisers: the round's mean change is a gradient that an Adam-like rule on the server follows.

Source: Reddi et al., Adaptive Federated Optimization, ICLR 2021 (arXiv 2003.00295), Algorithm 2.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.federated.weights import ClientUpdate, like, participating, weighted_mean


class _ServerOptimizer:
    """Algorithm 2 of the paper but for its second moment v.

    With the clients' mean x' (weighted as FedAvg weighs) and the global weights x::

        Delta = x' - x      m <- beta1 m + (1 - beta1) Delta      v <- second moment      x <- x + lr m / (sqrt(v) + tau)

    m starts at 0 and v at tau^2, the least the paper allows. As in the paper there is **no bias correction**: the first
    rounds are shorter by ``1 - beta1^t``, which the paper leaves to the choice of the learning rate.

    The moments are float64. A round without an update changes nothing, neither weights nor moments.

    Args:
        lr: server learning rate (eta). The paper tunes it for each task; the default is a starting point only [choice].
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        tau: degree of adaptivity, positive; the paper's 1e-3. Coordinates that change by much less move as under SGD.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        positive = all(math.isfinite(x) and x > 0 for x in (lr, tau))
        if not positive or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ConfigError(
                f"{type(self).__name__}: lr = {lr} and tau = {tau} must be positive, "
                f"beta1 = {beta1} and beta2 = {beta2} must lie in [0, 1)"
            )
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau
        self._m: dict[str, Tensor] = {}
        self._v: dict[str, Tensor] = {}

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """The next v from the last one and Delta^2."""
        raise NotImplementedError

    def check_clients(self, num_clients: int) -> None:
        """Any number will do."""

    def aggregate(self, current: Mapping[str, Tensor], updates: Mapping[str, ClientUpdate]) -> dict[str, Tensor]:
        """See :class:`~lightning_sfubm.federated.weights.WeightAggregator`; advances the moments.

        Raises:
            CheckpointError: the moments that were loaded are of another model.
        """
        present = participating(current, updates)
        if self._m and {k: x.shape for k, x in self._m.items()} != {k: x.shape for k, x in current.items()}:
            raise CheckpointError(
                f"the moments of {type(self).__name__} are of other parameters: resume with the same config"
            )
        if not present:
            return like(current, current)
        mean, stepped = weighted_mean(present), {}
        m, v = {}, {}
        for key, value in current.items():
            x = value.detach().double()
            delta = mean[key] - x
            last_m = self._m[key] if self._m else torch.zeros_like(delta)
            last_v = self._v[key] if self._v else torch.full_like(delta, self.tau**2)
            m[key] = self.beta1 * last_m + (1 - self.beta1) * delta
            v[key] = self.second_moment(last_v, delta.square())
            stepped[key] = x + self.lr * m[key] / (v[key].sqrt() + self.tau)
        self._m, self._v = m, v
        return like(current, stepped)

    def state_dict(self) -> dict[str, Tensor | float]:
        """Moments as ``<class>/m/<parameter>`` and ``<class>/v/<parameter>``, all tensors; empty before the first round."""
        prefix = type(self).__name__
        moments = {"m": self._m, "v": self._v}
        return {f"{prefix}/{kind}/{key}": x.clone() for kind, values in moments.items() for key, x in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | float]) -> None:
        """Restore the moments, bit for bit.

        Raises:
            CheckpointError: the state is another aggregator's, or not whole.
        """
        moments: dict[str, dict[str, Tensor]] = {"m": {}, "v": {}}
        for name, value in state.items():
            owner, _, rest = name.partition("/")
            kind, _, key = rest.partition("/")
            if owner != type(self).__name__ or kind not in moments or not isinstance(value, Tensor):
                raise CheckpointError(f"'{name}' is no state of {type(self).__name__}: resume with the same config")
            moments[kind][key] = value.detach().double().clone()
        m, v = moments["m"], moments["v"]
        if {k: x.shape for k, x in m.items()} != {k: x.shape for k, x in v.items()}:
            raise CheckpointError(f"the state of {type(self).__name__} lacks a moment of some parameter: it is torn")
        self._m, self._v = m, v


class FedAdam(_ServerOptimizer):
    """Adam on the server: ``v <- beta2 v + (1 - beta2) Delta^2``. See the base class for the whole rule and the settings."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """An exponential mean of Delta^2."""
        return self.beta2 * v + (1 - self.beta2) * squared


class FedYogi(_ServerOptimizer):
    """Yogi on the server: ``v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)``: v falls more slowly than Adam's.

    See the base class for the whole rule and the settings.
    """

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Moves towards Delta^2 by a step that does not grow with v."""
        return v - (1 - self.beta2) * squared * torch.sign(v - squared)
