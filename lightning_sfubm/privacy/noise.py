"""Random numbers that a guarantee rests on: no other stream is to be used for them."""

import hashlib

import numpy as np
import torch
from torch import Tensor


class NoiseStream:
    """Standard normal numbers from a counter-based generator (Philox) with a key of 128 bits.

    A :class:`torch.Generator` on the CPU keeps 32 bits of its seed, whatever it is given: noise drawn from it can be found by
    trying all of them, which takes hours, and subtracted. Here the key is a keyed hash of the whole secret. The numbers are
    as hard to guess as the secret is; one derived from a seed that others know hides nothing.

    Args:
        secret: any number of bytes.
        names: what the stream is for: one release, never two.
    """

    def __init__(self, secret: bytes, *names: object) -> None:
        key = hashlib.blake2b(secret, digest_size=64).digest()
        digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), key=key, digest_size=16).digest()
        self._random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent standard normal numbers of this shape, on the CPU, drawn in float64 and rounded to ``dtype``."""
        return torch.from_numpy(np.asarray(self._random.standard_normal(shape))).to(dtype)
