"""Gaussian perturbation of item vectors, drawn once per item.

This is obfuscation, not differential privacy: see :mod:`lightning_sfubm.privacy.attacks` for what it is worth.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError


def expected_cosine(sigma: float, dim: int) -> float:
    """Cosine of a unit vector and its perturbed self: ``1 / sqrt(1 + D sigma^2)``, exact to O(1/D)."""
    return float(1 / np.sqrt(1 + dim * sigma**2))


def row_hashes(vectors: Tensor) -> list[bytes]:
    """A hash of the exact float32 bytes of each row of (N, D)."""
    rows = vectors.detach().to("cpu", torch.float32).contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


class GaussianPerturbation:
    """``normalise(x + e)``, ``e ~ N(0, sigma^2 I)`` [paper: Gaussian noise], one fixed draw per item and secret.

    The noise of an item is a function of the secret and of what the item is called here: a name that is given for its vector,
    or the vector's own bytes. Uploading the item again, in another round or beside other items, sends the same noise, so that
    it cannot be averaged away. Without names that holds for equal bytes only, and the last bits of a text vector depend on
    the processor and on the batch it was encoded in; a vector with other bytes gets independent noise.

    Args:
        sigma: standard deviation per coordinate, at least 0. 0 sends the vectors as they are.
        secret: keys the noise; must be unknown to whoever receives the vectors.
        names: of rows, by :func:`row_hashes`; two vectors of one name must differ by rounding only.

    Raises:
        ConfigError: sigma is negative or not finite.
    """

    def __init__(self, sigma: float, secret: bytes, names: Mapping[bytes, bytes] | None = None) -> None:
        if not np.isfinite(sigma) or sigma < 0:
            raise ConfigError(f"noise sigma = {sigma} must be a number of at least 0")
        self.sigma = float(sigma)
        self._secret = secret
        self._names = names or {}

    def __call__(self, vectors: Tensor) -> Tensor:
        """Perturb unit rows (N, D); returns unit rows (N, D)."""
        if self.sigma == 0:
            return vectors.clone()
        return normalize(vectors + self.sigma * self._noise(vectors), dim=1)

    def _noise(self, vectors: Tensor) -> Tensor:
        noise = np.empty(vectors.shape, dtype=np.float32)
        for row, content in enumerate(row_hashes(vectors)):
            name = self._names.get(content, content)
            digest = hashlib.blake2b(name, key=self._secret[:64], digest_size=16).digest()
            noise[row] = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big"))).standard_normal(
                vectors.shape[1], dtype=np.float32
            )
        return torch.from_numpy(noise).to(vectors.device)

    def describe(self) -> dict[str, object]:
        """The mechanism in words and numbers, for ledgers and reports."""
        kind = "none" if self.sigma == 0 else "Gaussian perturbation (heuristic obfuscation, not differential privacy)"
        return {"mechanism": kind, "sigma": self.sigma, "drawn": "once per item"}
