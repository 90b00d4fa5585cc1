"""Intervals and tests on plain arrays, honest for the few clusters a sweep has."""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

MIN_CLUSTERS = 4
"""Fewer cluster means than this give no interval: their spread is not known well enough to state one."""

MIN_RANKED = 4
"""Fewer pairs than this give no rank correlation: 3 pairs can only say -1, -0.5, 0.5 or 1."""

MIN_RANKED_INTERVAL = 10
"""Fewer pairs give no interval of a rank correlation (simulated: see `tests/test_analysis_stats.py`)."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or the reason why there is none."""

    value: float | None
    """The estimate; None if it cannot be given."""
    low: float | None
    """Lower end of the interval; None if there is none."""
    high: float | None
    """Upper end of the interval; None if there is none."""
    n: int
    """Independent units behind it (clusters, pairs)."""
    note: str | None = None
    """Why a value or an interval is not given; None if nothing is missing."""


def _finite(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def mean_interval(
    values: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    unit: str = "clusters",
) -> Estimate:
    """Mean of the cluster means, with Student's t on those means.

    Rows of one cluster (a base model) are not independent, so each cluster counts once. A percentile
    bootstrap over so few clusters covers 50 % at 2 and 76 % at 3 where 95 % is claimed; t on the means holds.

    Args:
        values: [n] numbers; None and NaN are left out.
        clusters: [n] the cluster of each value; None makes each value its own cluster.
        confidence: share of intervals that hold the truth.
        unit: what a cluster is called in the note.
    """
    numbers = _finite(values)
    keys = range(len(numbers)) if clusters is None else clusters
    members: dict[Hashable, list[float]] = {}
    for key, number in zip(keys, numbers, strict=True):
        if not math.isnan(number):
            members.setdefault(key, []).append(number)
    means = np.array([np.mean(group) for group in members.values()])
    n = len(means)
    if n == 0:
        return Estimate(None, None, None, 0, "no values")
    mean = float(means.mean())
    if n < MIN_CLUSTERS:
        return Estimate(mean, None, None, n, f"too few: {n} {unit}, an interval needs {MIN_CLUSTERS}")
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, n - 1) * means.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def spearman(x: Sequence[float | None], y: Sequence[float | None], confidence: float = 0.95) -> Estimate:
    """Rank correlation of the pairs where both are known, with Fisher's z interval if there are enough.

    Source: standard error sqrt((1 + rho^2 / 2) / (n - 3)) of atanh(rho), Bonett and Wright 2000.
    """
    a, b = _finite(x), _finite(y)
    known = ~(np.isnan(a) | np.isnan(b))
    a, b, n = a[known], b[known], int(known.sum())
    if n < MIN_RANKED:
        return Estimate(None, None, None, n, f"too few: {n} pairs, a rank correlation needs {MIN_RANKED}")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(None, None, None, n, "one side does not vary")
    rho = float(np.clip(scipy_stats.spearmanr(a, b).statistic, -1, 1))
    if n < MIN_RANKED_INTERVAL:
        return Estimate(rho, None, None, n, f"too few: {n} pairs, an interval needs {MIN_RANKED_INTERVAL}")
    if abs(rho) == 1:
        return Estimate(rho, None, None, n, "the ranks agree wholly, so an interval has no width")
    half = scipy_stats.norm.ppf((1 + confidence) / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Estimate(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), n)


def spearman_within(
    x: Sequence[float | None], y: Sequence[float | None], groups: Sequence[Hashable]
) -> dict[Hashable, Estimate]:
    """Rank correlation inside each group, so that differences between groups cannot make one.

    Returns:
        Group -> estimate, in the order in which the groups first appear.
    """
    rows: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        rows.setdefault(group, []).append(index)
    return {g: spearman([x[i] for i in where], [y[i] for i in where]) for g, where in rows.items()}


def permutation_p(
    statistic: Callable[[np.ndarray], np.ndarray], num_labels: int, repetitions: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Two-sided p-value of a statistic when labels are exchangeable, and the smallest it could be.

    All permutations are tried if there are at most `repetitions` (6 labels: 720), else random ones.

    Args:
        statistic: maps orders of the labels [orders, labels] to a number each [orders].
        num_labels: how many labels are exchanged.
        repetitions: random permutations at most.
        seed: chooses them.
    """
    identity = np.arange(num_labels)
    exact = math.factorial(num_labels) <= repetitions
    if exact:  # the first one is the identity
        orders = np.array(list(itertools.permutations(range(num_labels))))
    else:
        rng = np.random.default_rng(seed)
        orders = np.array([identity, *(rng.permutation(num_labels) for _ in range(repetitions))])
    values = np.abs(statistic(orders))
    as_large = int(np.sum(values >= values[0] - 1e-12))  # rounding must not break ties
    # Ranks read backwards give the same absolute correlation, so the exact test has at least two.
    return as_large / len(orders), (min(2, len(orders)) if exact else 1) / len(orders)
