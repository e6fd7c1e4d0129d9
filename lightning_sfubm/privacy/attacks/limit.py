"""What differential privacy allows any attacker, however strong: the bound that measured attacks are held against."""

import math


def rate_limit(epsilon: float, delta: float, false_positives: float) -> float:
    """Largest true-positive rate at a false-positive rate under (epsilon, delta)-differential privacy.

    The two inequalities of Kairouz, Oh and Viswanath (ICML 2015, theorem 2.1) for telling a data set with a user from
    one without.

    Args:
        epsilon: at least 0; infinite = no guarantee.
        delta: in [0, 1].
        false_positives: in [0, 1].

    Returns:
        A rate in [0, 1].
    """
    factor = _exp(epsilon)
    if math.isinf(factor):
        return 1.0
    return min(1.0, factor * false_positives + delta, 1 - (1 - delta - false_positives) / factor)


def area_limit(epsilon: float, delta: float) -> float:
    """Largest area under the ROC curve: the area under :func:`rate_limit`; .5 at epsilon = delta = 0.

    Args:
        epsilon: at least 0; infinite = no guarantee.
        delta: in [0, 1].
    """
    factor = _exp(epsilon)
    if math.isinf(factor):
        return 1.0
    corner = (1 - delta) / (1 + factor)
    height = factor * corner + delta
    return (delta + height) / 2 * corner + (height + 1) / 2 * (1 - delta - corner) + delta


def _exp(epsilon: float) -> float:
    return math.inf if epsilon > 700 else math.exp(epsilon)
