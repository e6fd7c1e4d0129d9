from pathlib import Path

import torch
from torch.nn.functional import normalize

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise


def test_two_sigmas_of_one_secret_do_not_share_their_noise(tmp_path: Path) -> None:
    """Shared, they would be two equations for each vector: n u = x + sigma e, solved without knowing the secret."""
    clean = normalize(torch.randn(40, 384, generator=torch.Generator().manual_seed(0)), dim=1)
    low, high = 0.1, 0.2
    sent = {s: PrivacyNoise(s, str(tmp_path)).mechanism(0, "alpha")(clean) for s in (low, high)}
    assert torch.equal(sent[low], PrivacyNoise(low, str(tmp_path)).mechanism(0, "alpha")(clean))
    scaled = {s: (1 + clean.shape[1] * s**2) ** 0.5 * u for s, u in sent.items()}
    solved = normalize(scaled[low] - (scaled[high] - scaled[low]) * low / (high - low), dim=1)
    single = (sent[low] * clean).sum(1).mean()
    assert (solved * clean).sum(1).mean() < single  # with shared noise .999
