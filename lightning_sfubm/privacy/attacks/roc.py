"""How well a score tells two groups apart: area under the ROC curve, and the true-positive rate at a false-positive rate.

The area says how the attack does on average; the rate at 1 % false positives says whether it can name *some* members for
certain, which an average hides (Carlini et al., "Membership inference attacks from first principles", S&P 2022).
"""

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.significance import Estimate, wilson_interval
from lightning_sfubm.seeds import numpy_generator

Z = 1.959964  #: normal quantile of 95 % intervals
_Floats = npt.NDArray[np.float64]


def area_under_roc(positives: Tensor, negatives: Tensor) -> Estimate:
    """Probability that a positive's score is above a negative's, ties counting one half; chance is .5.

    Args:
        positives: (m,) scores.
        negatives: (n,) scores.

    Returns:
        The area with a 95 % interval; ``n`` is the number of scores.

    Raises:
        DataError: a group is empty or holds NaN.
    """
    high, low = _scores(positives, "positives"), np.sort(_scores(negatives, "negatives"))
    below = np.searchsorted(low, high, side="left")
    up_to = np.searchsorted(low, high, side="right")
    area = float((below + up_to).sum() / (2 * len(high) * len(low)))
    return Estimate(area, *area_interval(area, len(high), len(low)), len(high) + len(low))


def area_interval(area: float, positives: int, negatives: int, *, z: float = Z) -> tuple[float, float]:
    """Interval of an area under the ROC curve, by Newcombe's method 5 (Statistics in Medicine 25, 2006).

    A score interval like Wilson's, which does not collapse to a point where the groups are apart.

    Args:
        area: as measured, in [0, 1].
        positives: their number, at least 1.
        negatives: their number, at least 1.
        z: normal quantile; the default covers 95 %.
    """
    pairs, size = positives * negatives, (positives + negatives) / 2

    def variance(value: float) -> float:
        spread = (1 - value) / (2 - value) + value / (1 + value)
        return value * (1 - value) * (1 + (size - 1) * spread) / pairs

    def bound(inner: float, outer: float) -> float:
        """Where the distance from the area equals z standard deviations, between the area and the end of the range."""
        for _ in range(60):
            middle = (inner + outer) / 2
            inside = abs(middle - area) <= z * math.sqrt(variance(middle))
            inner, outer = (middle, outer) if inside else (inner, middle)
        return inner

    return bound(area, 0.0) if area > 0 else 0.0, bound(area, 1.0) if area < 1 else 1.0


def rate_at(
    positives: Tensor, negatives: Tensor, false_positives: float = 0.01, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Share of positives above the threshold that at most a given share of negatives exceeds; chance is that share.

    Args:
        positives: (m,) scores.
        negatives: (n,) scores. With fewer than ``1 / false_positives`` of them, none may exceed the threshold.
        false_positives: in [0, 1).
        resamples: bootstrap resamples of both groups, so that the threshold's own uncertainty is in the interval.
        seed: of the resamples.

    Returns:
        The rate with a 95 % interval (percentile bootstrap, no narrower than Wilson's); ``n`` counts the positives.

    Raises:
        DataError: a group is empty or holds NaN.
    """
    high, low = _scores(positives, "positives"), np.sort(_scores(negatives, "negatives"))
    place = len(low) - 1 - math.floor(false_positives * len(low) + 1e-9)
    hits = int((high > low[place]).sum())
    generator = numpy_generator(seed, "rate at false positives", len(high), len(low))
    rates = np.empty(resamples)
    for index in range(resamples):
        drawn = np.sort(low[generator.integers(len(low), size=len(low))])
        rates[index] = (high[generator.integers(len(high), size=len(high))] > drawn[place]).mean()
    lowest, highest = np.percentile(rates, [2.5, 97.5])
    value, wilson_low, wilson_high, count = wilson_interval(hits, len(high))
    return Estimate(value, min(float(lowest), wilson_low), max(float(highest), wilson_high), count)


def _scores(scores: Tensor, name: str) -> _Floats:
    values = scores.detach().cpu().double().numpy()
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise DataError(f"the scores of the {name} have shape {values.shape}; one number each is needed, and no NaN")
    return values
