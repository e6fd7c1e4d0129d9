"""Gaussian perturbation of item vectors, drawn once per item.

This is obfuscation, not differential privacy: see :mod:`lightning_sfubm.privacy.attacks` for what it is worth.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError


def expected_cosine(sigma: float, dim: int) -> float:
    """Cosine of a unit vector and its perturbed self: ``1 / sqrt(1 + D sigma^2)``, exact to O(1/D)."""
    return float(1 / np.sqrt(1 + dim * sigma**2))


class GaussianPerturbation:
    """``normalise(x + e)``, ``e ~ N(0, sigma^2 I)`` [paper: Gaussian noise], one fixed draw per item and secret.

    The noise of an item is a function of the secret and the item's own vector alone. Uploading the item again, in another
    round or beside other items, sends the same bytes, so that the noise cannot be averaged away. A different vector gets
    independent noise.

    Args:
        sigma: standard deviation per coordinate, at least 0. 0 sends the vectors as they are.
        secret: keys the noise; must be unknown to whoever receives the vectors.

    Raises:
        ConfigError: sigma is negative or not finite.
    """

    def __init__(self, sigma: float, secret: bytes) -> None:
        if not np.isfinite(sigma) or sigma < 0:
            raise ConfigError(f"noise sigma = {sigma} must be a number of at least 0")
        self.sigma = float(sigma)
        self._secret = secret

    def __call__(self, vectors: Tensor) -> Tensor:
        """Perturb unit rows (N, D); returns unit rows (N, D)."""
        if self.sigma == 0:
            return vectors.clone()
        return normalize(vectors + self.sigma * self._noise(vectors), dim=1)

    def _noise(self, vectors: Tensor) -> Tensor:
        # Keyed by the exact bytes: text vectors are computed once and cached by content, so an item keeps its bytes.
        keys = vectors.detach().to("cpu", torch.float32).contiguous().numpy()
        noise = np.empty(vectors.shape, dtype=np.float32)
        for row, key in enumerate(keys):
            digest = hashlib.blake2b(key.tobytes(), key=self._secret[:64], digest_size=16).digest()
            noise[row] = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big"))).standard_normal(
                vectors.shape[1], dtype=np.float32
            )
        return torch.from_numpy(noise).to(vectors.device)

    def describe(self) -> dict[str, object]:
        """The mechanism in words and numbers, for ledgers and reports."""
        kind = "none" if self.sigma == 0 else "Gaussian perturbation (heuristic obfuscation, not differential privacy)"
        return {"mechanism": kind, "sigma": self.sigma, "drawn": "once per item"}
