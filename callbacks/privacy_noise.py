"""The privacy noise as a callback of the federated loop."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.privacy.mechanisms import GaussianPerturbation
from lightning_sfubm.privacy.secret import client_secret
from lightning_sfubm.seeds import derive_seed


class PrivacyNoise(FederatedCallback):
    """Perturb item vectors before they leave a client (:class:`~lightning_sfubm.privacy.mechanisms.GaussianPerturbation`).

    Args:
        sigma: noise per coordinate; [paper: 0 to 0.2]. 0 sends the vectors as they are, which must be asked for.
        secret_dir: folder with one secret a client (``<client>.key``), made at first use with mode 600. Where it is
            ``None`` the secrets are derived from the run's seed: reproducible, and right for simulation only, since
            whoever knows the seed can subtract the noise. The ledger says which.

    Raises:
        ConfigError: sigma is negative or not finite.
    """

    protects = frozenset({"semantics"})

    def __init__(self, sigma: float = 0.05, secret_dir: str | None = None) -> None:
        GaussianPerturbation(sigma, b"")  # checks sigma now, not after minutes of encoding
        self.sigma, self.secret_dir = sigma, secret_dir

    def on_upload(self, loop: FederatedLoop, client: str, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Perturb ``vectors`` of a semantics message; other kinds pass unchanged."""
        if kind != "semantics":
            return tensors
        mechanism = self.mechanism(loop.seed, client, names=loop.clients[client].text_names())
        return {**tensors, "vectors": mechanism(tensors["vectors"])}

    def describe_upload(self, kind: str) -> dict[str, object]:
        """The mechanism, and where its secret comes from."""
        if kind != "semantics":
            return {}
        secret = "kept by the client" if self.secret_dir else "derived from the run's seed (simulation only)"
        return {**GaussianPerturbation(self.sigma, b"").describe(), "secret": secret}

    def order_seed(self, seed: int, client: str) -> int:
        """Root of the order in which a client's vectors leave: its secret where it has one, or the run's seed."""
        return seed if self.secret_dir is None else int.from_bytes(self._secret(seed, client), "big")

    def mechanism(
        self, seed: int, client: str, sigma: float | None = None, names: Mapping[bytes, bytes] | None = None
    ) -> GaussianPerturbation:
        """The perturbation of one client.

        Args:
            seed: of the run.
            client: its name.
            sigma: another than this callback's, for sweeps.
            names: what its vectors are the vectors of, see :meth:`~lightning_sfubm.federated.client.Client.text_names`.
        """
        sigma = self.sigma if sigma is None else sigma
        secret = self._secret(seed, client)
        if self.secret_dir is not None:
            # The same noise at two sigmas would be two equations for one vector: whoever holds both uploads solves them.
            secret = hashlib.blake2b(repr(float(sigma)).encode(), key=secret[:64]).digest()
        return GaussianPerturbation(sigma, secret, names)

    def _secret(self, seed: int, client: str) -> bytes:
        if self.secret_dir is None:
            return derive_seed(seed, "noise secret", client).to_bytes(8, "big")
        return client_secret(self.secret_dir, client)
