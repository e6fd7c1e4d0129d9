"""How many clients a share of them is."""

import math

_ROUNDING = 1e-9  #: .28 of 25 is 7.000000000000001 in floating point, and 7 clients


def clients_of(share: float, count: int) -> int:
    """The fewest clients that are at least a share of ``count``."""
    return math.ceil(share * count - _ROUNDING)
