"""How much privacy training has spent: an accountant of Poisson-subsampled Gaussian steps, with a budget.

A step takes each user independently with probability q (the sample rate), sums the sampled users' contributions, each of
norm at most C, and adds Gaussian noise of standard deviation ``noise_multiplier * C``. The neighbouring relation is "one user
added or removed". The guarantee holds for this sampling only: batches cut from a shuffled epoch give a weaker one.

The arithmetic is that of Opacus (extra ``dp``), imported when the first epsilon is asked for.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.privacy.rounding import round_up

Mechanism = Literal["prv", "rdp"]
Entry = tuple[float, float, int]  #: noise multiplier, sample rate, steps

#: Orders of Renyi DP that the conversion to (epsilon, delta) chooses from; those Opacus uses.
RDP_ORDERS = (*(1 + k / 10 for k in range(1, 100)), *range(12, 64))

_MAX_NOISE = 1e6
#: Against the exact Gaussian (q = 1) PRV's epsilon was too small by up to 2 % at deltas of 1e-11 to 1e-13, never at 1e-10.
_PRV_LEAST_DELTA = 1e-10


class PrivacyAccountant:
    """Composes the steps of a training run and says what (epsilon, delta) they have spent.

    Args:
        mechanism: ``"prv"`` composes privacy loss random variables numerically (Gopi et al., NeurIPS 2021, arXiv
            2106.02848), an upper bound within .011 of the true value down to a delta of 1e-10, below which its floating point
            falls short of the true value and it is refused; ``"rdp"`` composes Renyi divergences (Mironov et al.,
            arXiv 1908.10530; conversion by Balle et al., AISTATS 2020), looser and quicker.
        target_epsilon: budget that :meth:`check` defends; ``None`` = none.
        delta: delta of the budget, and of :meth:`epsilon` where none is given.
        orders: orders of ``"rdp"``.

    Raises:
        ConfigError: unknown mechanism, or a number out of range.
    """

    def __init__(
        self,
        mechanism: Mechanism = "prv",
        *,
        target_epsilon: float | None = None,
        delta: float | None = None,
        orders: Sequence[float] = RDP_ORDERS,
    ) -> None:
        _require_mechanism(mechanism)
        if target_epsilon is not None and (not target_epsilon > 0 or delta is None):
            raise ConfigError(
                f"a privacy budget needs a positive target_epsilon (here {target_epsilon}) and a delta (here {delta})"
            )
        if delta is not None:
            _require_delta(delta)
        self.mechanism = mechanism
        self.target_epsilon = target_epsilon
        self.delta = delta
        self.orders = tuple(orders)
        self._history: tuple[Entry, ...] = ()
        self._allowed: tuple[Entry, ...] = ()

    @property
    def history(self) -> list[Entry]:
        """(noise multiplier, sample rate, steps) in order; equal neighbours are merged."""
        return list(self._history)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return sum(steps for _, _, steps in self._history)

    def step(self, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Count steps that have been, or are about to be, taken.

        Args:
            noise_multiplier: standard deviation of the noise over the clipping norm, at least 0 (0 spends everything).
            sample_rate: q in (0, 1].
            steps: how many, at least 0.

        Raises:
            ConfigError: a number is out of range.
        """
        self._history = self._with(noise_multiplier, sample_rate, steps)

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent so far; 0 before the first step, infinite after a step without noise.

        Args:
            delta: in (0, 1); ``None`` = the accountant's.

        Raises:
            ConfigError: there is no delta.
            PrivacyError: the mechanism cannot account for this history.
        """
        delta = self.delta if delta is None else delta
        if delta is None:
            raise ConfigError("epsilon is defined for a delta: give one")
        _require_delta(delta)
        return _epsilon(self.mechanism, self._history, delta, self.orders)

    def rdp(self, orders: Iterable[float]) -> list[float]:
        """Renyi divergence bound of all steps so far, by order."""
        return [_composed_rdp(self._history, float(order)) for order in orders]

    def check(self, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Refuse steps that would pass the budget, before they are taken. Checking a whole plan makes its steps free to check.

        Args:
            noise_multiplier: as in :meth:`step`.
            sample_rate: as in :meth:`step`.
            steps: how many are to come.

        Raises:
            PrivacyError: they would pass ``target_epsilon``.
            ConfigError: a number is out of range.
        """
        planned = self._with(noise_multiplier, sample_rate, steps)
        if self.target_epsilon is None or _is_part(planned, self._allowed):
            return
        assert self.delta is not None
        spent = _epsilon(self.mechanism, planned, self.delta, self.orders)
        if spent > self.target_epsilon:
            raise PrivacyError(
                f"{steps} more private steps after {self.steps} would spend epsilon {round_up(spent, 4)} at delta "
                f"{self.delta:g}, over the budget of {self.target_epsilon:g}: train for fewer steps, or raise "
                "noise_multiplier or target_epsilon"
            )
        self._allowed = planned

    def state_dict(self) -> dict[str, Any]:
        """Mechanism and history, in plain numbers."""
        return {"mechanism": self.mechanism, "history": [list(entry) for entry in self._history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored history.

        Raises:
            PrivacyError: the state is another mechanism's, or no history.
        """
        other = state.get("mechanism")
        if other != self.mechanism:
            raise PrivacyError(
                f"the privacy state was written by the mechanism {other!r}, this accountant is {self.mechanism!r}: "
                "their figures do not compare; go on with the one that wrote it"
            )
        stored = PrivacyAccountant(self.mechanism)
        try:
            for noise_multiplier, sample_rate, steps in state["history"]:
                stored.step(float(noise_multiplier), float(sample_rate), int(steps))
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError(
                f"the privacy state holds no history of steps ({error}): what was spent is unknown"
            ) from None
        self._history = stored._history

    def _with(self, noise_multiplier: float, sample_rate: float, steps: int) -> tuple[Entry, ...]:
        if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0 and 0 < sample_rate <= 1 and steps >= 0):
            raise ConfigError(
                f"noise_multiplier = {noise_multiplier} (>= 0), sample_rate = {sample_rate} (in (0, 1]) and "
                f"steps = {steps} (>= 0) are required"
            )
        if not steps:
            return self._history
        *past, last = self._history or ((0.0, 0.0, 0),)
        if last[:2] == (noise_multiplier, sample_rate):
            return (*past, (noise_multiplier, sample_rate, last[2] + steps))
        return (*self._history, (noise_multiplier, sample_rate, steps))


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    mechanism: Mechanism = "prv",
    tolerance: float = 1e-3,
) -> float:
    """Smallest noise multiplier whose steps stay within (target_epsilon, delta), from above.

    Args:
        target_epsilon: positive.
        delta: in (0, 1).
        sample_rate: q in (0, 1].
        steps: at least 1.
        mechanism: of the accounting.
        tolerance: relative; the result is at most this much above the smallest one.

    Returns:
        A noise multiplier that keeps the budget.

    Raises:
        ConfigError: a number is out of range.
        PrivacyError: not even a noise multiplier of a million keeps it.
    """
    _require_mechanism(mechanism)
    _require_delta(delta)
    if not (target_epsilon > 0 and math.isfinite(target_epsilon) and 0 < sample_rate <= 1 and steps >= 1):
        raise ConfigError(
            f"target_epsilon = {target_epsilon} (> 0), sample_rate = {sample_rate} (in (0, 1]), steps = {steps} (>= 1) "
            "are required"
        )
    return _noise_multiplier_for(target_epsilon, delta, sample_rate, steps, mechanism, tolerance)


@lru_cache(maxsize=256)
def _noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, mechanism: Mechanism, tolerance: float
) -> float:
    def keeps(noise: float, by: Mechanism = mechanism) -> bool:
        return _epsilon(by, ((noise, sample_rate, steps),), delta, RDP_ORDERS) <= target_epsilon

    high = 1.0
    while high < _MAX_NOISE and not keeps(
        high, "rdp"
    ):  # PRV needs a hundred gigabytes where the noise is much too small
        high *= 2
    while not keeps(high):
        high *= 2
        if high > _MAX_NOISE:
            raise PrivacyError(
                f"no noise keeps {steps} steps at sample rate {sample_rate:g} within epsilon {target_epsilon:g} at delta "
                f"{delta:g} by the accounting {mechanism!r}: raise target_epsilon or take fewer steps"
            )
    low = high / 2
    while keeps(low):
        high, low = low, low / 2
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _is_part(history: tuple[Entry, ...], whole: tuple[Entry, ...]) -> bool:
    """Whether a history is a beginning of another one."""
    if not history:
        return True
    *past, (noise, rate, steps) = history
    place = len(past)
    return (
        len(whole) > place
        and whole[:place] == tuple(past)
        and whole[place][:2] == (noise, rate)
        and whole[place][2] >= steps
    )


@lru_cache(maxsize=1024)
def _epsilon(mechanism: Mechanism, history: tuple[Entry, ...], delta: float, orders: tuple[float, ...]) -> float:
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    if mechanism == "prv" and delta < _PRV_LEAST_DELTA:
        raise PrivacyError(
            f"PRV accounting is no bound at delta {delta:g}, below {_PRV_LEAST_DELTA:g}: account with 'rdp'"
        )
    _require_opacus()
    with warnings.catch_warnings():
        # Log of 0 at q = 1, where the privacy loss has no lower end; an optimum at the first or last order.
        warnings.simplefilter("ignore")
        if mechanism == "rdp":
            from opacus.accountants.analysis.rdp import get_privacy_spent

            rdp = [_composed_rdp(history, float(order)) for order in orders]
            return max(0.0, float(get_privacy_spent(orders=list(orders), rdp=rdp, delta=delta)[0]))
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = list(history)
        try:
            epsilon = float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            raise PrivacyError(
                f"PRV accounting fails for the steps {list(history)} at delta {delta:g} "
                f"({str(error) or type(error).__name__}): account with 'rdp'"
            ) from None
    if math.isnan(epsilon):
        raise PrivacyError(f"PRV accounting gives no number for the steps {list(history)}: account with 'rdp'")
    return max(0.0, epsilon)


def _composed_rdp(history: tuple[Entry, ...], order: float) -> float:
    return sum(steps * _step_rdp(noise, rate, order) for noise, rate, steps in history)


@lru_cache(maxsize=65536)
def _step_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Renyi divergence of one step; epsilon is shown after each, so it is computed once."""
    _require_opacus()
    from opacus.accountants.analysis.rdp import compute_rdp

    return float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))


def _require_opacus() -> None:
    try:
        import opacus  # noqa: F401
    except ImportError:
        raise PrivacyError("privacy accounting needs the package 'opacus': pip install 'lightning-sfubm[dp]'") from None


def _require_mechanism(mechanism: str) -> None:
    if mechanism not in get_args(Mechanism):
        raise ConfigError(f"accounting {mechanism!r} is unknown; choose one of {get_args(Mechanism)}")


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta} must lie between 0 and 1")
