"""Privacy parameters in print: rounded up, for a smaller number than the true one would promise too much."""

import math
from decimal import ROUND_CEILING, Context, Decimal


def round_up(value: float, digits: int) -> str:
    """The number in decimal, not below its shortest exact spelling: .000149 in one digit is ``"0.0002"``.

    Args:
        value: an epsilon, a delta, or what an attacker can reach at most; infinite gives ``"inf"``.
        digits: significant ones, at least 1.
    """
    if not math.isfinite(value):
        return str(value)
    up = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(str(float(value))))
    return f"{float(up):.{digits}g}"
