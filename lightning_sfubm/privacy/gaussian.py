"""The analytic Gaussian mechanism: the least noise for (epsilon, delta), for every epsilon.

Balle and Wang, "Improving the Gaussian mechanism for differential privacy" (ICML 2018, arXiv 1805.06530), theorem 8: adding
N(0, sigma^2 I) to a value of L2 sensitivity D is (epsilon, delta)-private exactly if

    Phi(D / 2 sigma - epsilon sigma / D) - e^epsilon Phi(-D / 2 sigma - epsilon sigma / D) <= delta.

The textbook's ``sigma = D sqrt(2 ln(1.25 / delta)) / epsilon`` is proved for epsilon < 1 only, and too small for large ones.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.privacy.noise import NoiseStream

Neighbours = Literal["replacement", "add_remove"]


def gaussian_delta(epsilon: float, sigma: float, sensitivity: float = 1.0) -> float:
    """The exact delta of Gaussian noise at an epsilon.

    Args:
        epsilon: at least 0.
        sigma: standard deviation per coordinate, positive.
        sensitivity: largest L2 distance of the values of two neighbours, positive.

    Returns:
        Delta in [0, 1]; accurate also where both terms of the formula underflow or ``e^epsilon`` overflows.

    Raises:
        ConfigError: a number is out of range.
    """
    if not (epsilon >= 0 and sigma > 0 and sensitivity > 0 and math.isfinite(epsilon + sigma + sensitivity)):
        raise ConfigError(
            f"epsilon = {epsilon} (>= 0), sigma = {sigma} (> 0) and sensitivity = {sensitivity} (> 0) are required"
        )
    half, tilt = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    upper, lower = half - tilt, -half - tilt
    # lower^2 - upper^2 = 2 epsilon: both terms carry the factor exp(-upper^2 / 2), and e^epsilon cancels.
    factor = math.exp(-upper * upper / 2)
    second = factor * _erfcx(-lower / math.sqrt(2)) / 2
    if upper > 0:
        return max(0.0, math.erfc(-upper / math.sqrt(2)) / 2 - second)
    return max(0.0, factor * _erfcx(-upper / math.sqrt(2)) / 2 - second)


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest standard deviation that is (epsilon, delta)-private.

    Args:
        epsilon: at least 0.
        delta: in (0, 1).
        sensitivity: L2 sensitivity, positive.

    Returns:
        Sigma, with ``gaussian_delta(epsilon, sigma, sensitivity) <= delta``.

    Raises:
        ConfigError: a number is out of range.
    """
    if not (epsilon >= 0 and math.isfinite(epsilon) and 0 < delta < 1 and 0 < sensitivity < math.inf):
        raise ConfigError(
            f"epsilon = {epsilon} (>= 0), delta = {delta} (between 0 and 1) and sensitivity = {sensitivity} (> 0) are required"
        )
    low = high = 1.0  # of sigma / sensitivity; delta falls in it
    while gaussian_delta(epsilon, high) > delta:
        low, high = high, 2 * high
    while gaussian_delta(epsilon, low) <= delta:
        low, high = low / 2, low
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if gaussian_delta(epsilon, middle) > delta else (low, middle)
    return high * sensitivity


class GaussianMechanism:
    """Clip a message to a norm and add the noise that makes it (epsilon, delta)-private at its sender.

    The sensitivity follows from the clipping, it is no setting of its own. With ``"replacement"`` two data sets are neighbours
    if one is the other with the sender's whole data replaced by any other data: clipped messages lie up to ``2 * clip_norm``
    apart. With ``"add_remove"`` they are neighbours if the sender's data is there in one and missing in the other, a missing
    sender counting as a message of zeros: up to ``clip_norm`` apart.

    Args:
        epsilon: of all releases together, positive.
        delta: of all releases together.
        clip_norm: L2 norm that the whole message, all its tensors together, is clipped to.
        neighbours: ``"replacement"`` or ``"add_remove"``.
        releases: messages that will be sent in all; k Gaussian releases are one with sqrt(k) times the sensitivity, exactly
            (theorem 8 applied to the k messages side by side). A further one is refused.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        epsilon: float,
        delta: float,
        clip_norm: float,
        neighbours: Neighbours = "replacement",
        releases: int = 1,
    ) -> None:
        if neighbours not in get_args(Neighbours):
            raise ConfigError(f"neighbours = {neighbours!r} is unknown; choose one of {get_args(Neighbours)}")
        if not 0 < clip_norm < math.inf or releases < 1 or not epsilon > 0:
            raise ConfigError(
                f"clip_norm = {clip_norm} (> 0), releases = {releases} (>= 1) and epsilon = {epsilon} (> 0) are required"
            )
        self.epsilon, self.delta, self.clip_norm = epsilon, delta, clip_norm
        self.neighbours, self.releases, self.released = neighbours, releases, 0
        self.sensitivity = clip_norm * (2.0 if neighbours == "replacement" else 1.0)
        self.sigma = gaussian_sigma(epsilon, delta, self.sensitivity * math.sqrt(releases))

    def __call__(self, tensors: Mapping[str, Tensor], noise: NoiseStream) -> dict[str, Tensor]:
        """Clip and perturb a message.

        Args:
            tensors: by name; their shapes are public.
            noise: stream unknown to the receiver and never used for another message.

        Returns:
            Tensors of the same names and shapes.

        Raises:
            PrivacyError: all releases have been made, or a value is not finite.
        """
        if self.released == self.releases:
            raise PrivacyError(
                f"the {self.releases} releases that sigma was set for have been made: nothing more may leave"
            )
        norm = math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values()))
        if not math.isfinite(norm):
            raise PrivacyError("a message holds values that are not finite: they cannot be clipped")
        self.released += 1
        factor = min(1.0, self.clip_norm / norm) if norm else 1.0
        return {
            name: tensor.detach() * factor
            + (noise.normal(tuple(tensor.shape)) * self.sigma).to(tensor.device, tensor.dtype)
            for name, tensor in tensors.items()
        }

    def describe(self) -> dict[str, object]:
        """The mechanism in words and numbers, for ledgers and reports."""
        return {
            "mechanism": "analytic Gaussian",
            "epsilon": self.epsilon,
            "delta": self.delta,
            "clip_norm": self.clip_norm,
            "neighbours": self.neighbours,
            "sigma": self.sigma,
            "releases": self.releases,
        }


def _erfcx(x: float) -> float:
    """``exp(x^2) erfc(x)`` for x >= 0."""
    return float(torch.special.erfcx(torch.tensor(x, dtype=torch.float64)))
