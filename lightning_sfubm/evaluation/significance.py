"""Intervals and paired tests over per-user results.

Users are the unit of resampling. Proportions get Wilson score intervals (they do not collapse to a point at 0 or 1),
means a percentile bootstrap, differences of two methods a percentile bootstrap over the *same* users, and Hit@1 also
an exact test: McNemar's of one run, the sign-flip test, of which McNemar's is the case of one run, of several [choice].
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_sfubm.errors import DataError
from lightning_sfubm.seeds import numpy_generator

if TYPE_CHECKING:
    from lightning_sfubm.evaluation.results import PerUserResults

Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 22  # draws held at once: 32 MB of int64


class Estimate(NamedTuple):
    """A mean with its interval; all NaN where ``n == 0``."""

    value: float
    low: float
    high: float
    n: int  #: users the mean is taken over


class PairedDifference(NamedTuple):
    """``a - b`` over the users that both results hold."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    users: int  #: users compared
    only_in_a: int  #: users left out because b lacks them (or has no value for them)
    only_in_b: int
    a_wins: int  #: users with a hit under a alone
    b_wins: int
    p_mcnemar: float  #: exact two-sided McNemar test of Hit@1; NaN for other metrics


def bootstrap_means(values: Floats, *, resamples: int = 1000, seed: int = 0) -> Floats:
    """Means of bootstrap resamples over users, many metrics at once.

    The same resamples serve every column, so columns stay comparable. Columns may hold NaN ("not defined for this
    user"); such users count in no mean of that column.

    Args:
        values: (U, M) one row per user.
        resamples: number of resamples.
        seed: seed of the stream ``("bootstrap", U)``.

    Returns:
        (resamples, M) means; NaN where a resample holds no defined value.
    """
    users = values.shape[0]
    if not users:
        return np.full((resamples, values.shape[1]), np.nan)
    defined = np.isfinite(values)
    both = np.concatenate([np.where(defined, values, 0.0), defined.astype(np.float64)], axis=1)
    rng = numpy_generator(seed, "bootstrap", users)
    step = max(1, _CHUNK // users)
    sums = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = rng.integers(users, size=(rows, users)) + users * np.arange(rows)[:, None]
        times_drawn = np.bincount(draws.ravel(), minlength=rows * users).reshape(rows, users)
        sums.append(times_drawn @ both)
    totals = np.concatenate(sums)
    numerator, count = np.split(totals, 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return numerator / count


def bootstrap_ci(values: Floats, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> list[Estimate]:
    """Percentile bootstrap intervals of column means.

    Args:
        values: (U, M) one row per user; NaN where a metric is not defined for the user.
        level: coverage.
        resamples: number of resamples.
        seed: see :func:`bootstrap_means`.

    Returns:
        M estimates.
    """
    means = bootstrap_means(values, resamples=resamples, seed=seed)
    tail = 50 * (1 - level)
    estimates = []
    for column, resampled in zip(values.T, means.T, strict=True):
        defined = column[np.isfinite(column)]
        resampled = resampled[np.isfinite(resampled)]
        if not defined.size or not resampled.size:
            estimates.append(Estimate(np.nan, np.nan, np.nan, 0))
            continue
        low, high = np.percentile(resampled, [tail, 100 - tail])
        estimates.append(Estimate(float(defined.mean()), float(low), float(high), int(defined.size)))
    return estimates


def wilson_interval(successes: float, n: int, *, z: float = 1.959964) -> Estimate:
    """Wilson score interval of a proportion.

    Args:
        successes: number of hits; of several runs over the same users their mean, which need not be whole.
        n: number of users.
        z: normal quantile; the default covers 95 %.

    Returns:
        The proportion with its interval.
    """
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound equals the share; rounding must not put it on the wrong side.
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def mcnemar_exact(a_wins: int, b_wins: int) -> float:
    """Exact two-sided McNemar test.

    Args:
        a_wins: users with a hit under method a alone.
        b_wins: users with a hit under method b alone.

    Returns:
        Probability, under equal chances, of a split at least as uneven; 1 where the methods never differ.
    """
    n, smaller = a_wins + b_wins, min(a_wins, b_wins)
    if n == 0:
        return 1.0
    return float(min(1.0, 2 * _binomial_half(n)[: smaller + 1].sum()))


def sign_flip_exact(differences: npt.ArrayLike) -> float:
    """Exact two-sided sign-flip test that the users' differences are centred at zero.

    Under the null hypothesis a user's difference has either sign with equal chances, independently of the other users. With
    differences of -1, 0 and 1 this is McNemar's exact test (:func:`mcnemar_exact`); sums of a user's differences over several
    runs use all of them. Like the intervals it tells of these runs' users, not of further runs.

    Args:
        differences: (U,) integers, one a user.

    Returns:
        Probability, under random signs, of a sum at least as far from zero; 1 where all differences are zero.
    """
    sizes, users = np.unique(np.abs(np.asarray(differences, dtype=np.int64)), return_counts=True)
    reached = abs(int(np.sum(differences, dtype=np.int64)))
    chances, smallest = np.ones(1), 0  # of the sums smallest, smallest + 1, ... so far
    for size, n in zip(sizes.tolist(), users.tolist(), strict=True):
        if size:
            spread = np.zeros(2 * size * n + 1)
            spread[:: 2 * size] = _binomial_half(n)
            chances, smallest = np.convolve(chances, spread), smallest - size * n
    sums = np.arange(smallest, smallest + len(chances))
    # All terms are positive and the distribution is symmetric: one tail twice loses no digits where it is small.
    return float(min(1.0, 2 * chances[sums >= reached].sum())) if reached else 1.0


def _binomial_half(n: int) -> Floats:
    """Chances (n + 1,) of 0 to n heads of n fair coins."""
    k = np.arange(1, n + 1, dtype=np.float64)
    logs = np.concatenate([[0.0], np.cumsum(np.log(n + 1 - k) - np.log(k))]) - n * math.log(2)
    return np.exp(logs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of tests.

    Args:
        p_values: raw p-values; NaN entries are not tests, stay NaN and do not count in the family.

    Returns:
        Adjusted p-values in the same order.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(raw, np.nan)
    tests = np.flatnonzero(np.isfinite(raw))
    order = tests[np.argsort(raw[tests], kind="stable")]
    steps = (len(order) - np.arange(len(order))) * raw[order]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted.tolist()


def paired_difference(
    a: "PerUserResults", b: "PerUserResults", metric: str = "hit@1", *, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compare two methods user by user.

    Args:
        a: results of one method.
        b: results of the other, on the same candidate lists.
        metric: a name of :data:`~lightning_sfubm.evaluation.results.METRICS`.
        resamples: bootstrap resamples.
        seed: see :func:`bootstrap_means`.

    Returns:
        The difference a - b with a 95 % interval, over the users for whom both have a value; the counts of users
        left out are part of the answer.

    Raises:
        DataError: the results are not about the same domain, split, candidate lists or targets.
    """
    for name in ("domain", "split", "candidate_hash", "ties"):
        ours, theirs = getattr(a.meta, name), getattr(b.meta, name)
        if ours != theirs:
            raise DataError(
                f"results of {a.meta.method!r} and {b.meta.method!r} cannot be compared: {name} is {ours!r} in one and "
                f"{theirs!r} in the other; evaluate both on the same stored candidate lists."
            )
    _, rows_a, rows_b = np.intersect1d(a.user, b.user, assume_unique=True, return_indices=True)
    if not np.array_equal(a.target[rows_a], b.target[rows_b]):
        raise DataError(
            f"results of {a.meta.method!r} and {b.meta.method!r} disagree about the target of some users: "
            "they come from different data."
        )
    values_a, values_b = a.per_user(metric)[rows_a], b.per_user(metric)[rows_b]
    both = np.isfinite(values_a) & np.isfinite(values_b)
    values_a, values_b = values_a[both], values_b[both]
    users = len(values_a)
    estimate = bootstrap_ci((values_a - values_b)[:, None], resamples=resamples, seed=seed)[0]
    a_wins = b_wins = 0
    p_mcnemar = float("nan")
    if metric == "hit@1" and users:
        a_wins, b_wins = int((values_a > values_b).sum()), int((values_b > values_a).sum())
        p_mcnemar = mcnemar_exact(a_wins, b_wins)
    return PairedDifference(
        metric,
        float(values_a.mean()) if users else np.nan,
        float(values_b.mean()) if users else np.nan,
        estimate.value,
        estimate.low,
        estimate.high,
        users,
        len(a) - users,
        len(b) - users,
        a_wins,
        b_wins,
        p_mcnemar,
    )
