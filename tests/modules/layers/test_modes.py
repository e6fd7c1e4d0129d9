import pytest
from torch import nn

from lightning_sfubm.modules.layers.modes import evaluating


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_part_gets_its_own_mode_back(fails: bool) -> None:
    """A new container is in training mode; the finished model inside it must not be put there."""
    finished = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    both = nn.Sequential(finished, nn.Dropout(0.5))
    before = modes(both)
    assert True in before
    assert False in before
    try:
        with evaluating(both):
            assert not any(modes(both))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert modes(both) == before


def test_a_module_learns_that_it_trains_again() -> None:
    class Counting(nn.Module):
        calls: tuple[bool, ...] = ()

        def train(self, mode: bool = True) -> "Counting":
            self.calls += (mode,)
            return super().train(mode)

    module = Counting()
    with evaluating(module):
        pass
    assert module.calls == (False, True)
