"""The factor by which a tuned head's addition is weighed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.modules.llm.calibration import fit_factor


def drawn(seed: int, share: float, users: int = 2000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets drawn from softmax(base + share * added)."""
    generator = torch.Generator().manual_seed(seed)
    base, added = (torch.randn(users, 8, generator=generator) for _ in range(2))
    target = torch.multinomial(torch.softmax(base + share * added, 1), 1, generator=generator).squeeze(1)
    return base, added, target


def test_finds_the_factor_the_targets_were_drawn_with() -> None:
    for share in (0.3, 1.0, 2.0):
        assert abs(fit_factor(*drawn(1, share)) - share) < 0.15


def test_is_zero_where_the_addition_misleads_and_bounded_where_it_tells_all() -> None:
    base, added, target = drawn(2, 1.0)
    assert fit_factor(base, -added, target) == 0.0
    certain = torch.nn.functional.one_hot(target, 8).float()
    assert fit_factor(base, certain, target, largest=4.0) == 4.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_no_other_factor_is_more_likely(seed: int) -> None:
    base, added, target = drawn(seed, 0.5, users=60)
    best = fit_factor(base, added, target)
    loss = torch.nn.functional.cross_entropy
    for other in torch.linspace(0, 4, 41):
        assert loss(base + best * added, target) <= loss(base + other * added, target) + 1e-5
