"""Shamir's secret sharing (Shamir, 1979, "How to share a secret") of 32-byte secrets.

The secret is the value at 0 of a random polynomial of degree t - 1 over a prime field; share i is its value at i. Any t
shares fix the polynomial, fewer say nothing about the value at 0.
"""

import secrets
from collections.abc import Mapping

from lightning_sfubm.errors import MessageError, PrivacyError

PRIME = 2**256 + 297  # the smallest prime above every 32-byte secret
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares for the points 1 to ``count``, any ``threshold`` of which give back the 32-byte ``secret``."""
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for point in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def recover(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from shares by point (Lagrange interpolation at 0, over the ``threshold`` lowest points).

    Raises:
        PrivacyError: fewer than ``threshold`` shares.
        MessageError: a share is not a field element, or the shares do not belong to a 32-byte secret.
    """
    if len(shares) < threshold:
        raise PrivacyError(f"{len(shares)} shares of a secret that only {threshold} can recover")
    points = sorted(shares)[:threshold]
    values = {point: int.from_bytes(shares[point], "big") for point in points}
    if any(value >= PRIME for value in values.values()):
        raise MessageError("a share of a secret is not an element of its field")
    secret = 0
    for point in points:
        others = [other for other in points if other != point]
        above = below = 1
        for other in others:
            above = above * other % PRIME
            below = below * (other - point) % PRIME
        secret = (secret + values[point] * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 1 << 256:
        raise MessageError("the shares do not belong to one secret: at least one of them was altered")
    return secret.to_bytes(32, "big")
