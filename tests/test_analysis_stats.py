"""Intervals cover what they claim, and are not given where they cannot."""

import math

import numpy as np
import pytest

from analysis import stats


@pytest.mark.parametrize("clusters", [4, 6, 12])
def test_interval_on_cluster_means_covers_95_percent(clusters):
    rng = np.random.default_rng(clusters)
    hits = 0
    for _ in range(1000):
        centres = rng.normal(0.3, 1.0, clusters).repeat(5)
        values = centres + rng.normal(0, 0.5, clusters * 5)
        estimate = stats.mean_interval(values, np.arange(clusters).repeat(5))
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_interval_of_a_rank_correlation_is_not_too_narrow(rho):
    rng = np.random.default_rng(1)
    truth, hits = 6 / math.pi * math.asin(rho / 2), 0  # Spearman's rho of a bivariate normal
    for _ in range(1000):
        x = rng.normal(size=stats.MIN_RANKED_INTERVAL)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=len(x))
        estimate = stats.spearman(x, y)
        hits += estimate.low is not None and estimate.low <= truth <= estimate.high
    assert 0.93 <= hits / 1000 <= 0.99


def test_permutation_test_finds_nothing_where_nothing_is():
    rng = np.random.default_rng(2)
    small = 0
    for _ in range(200):
        x, y = rng.normal(size=6), rng.normal(size=6)
        p, smallest = stats.permutation_p(lambda orders, x=x, y=y: (x - x.mean())[orders] @ (y - y.mean()), 6)
        assert smallest == pytest.approx(2 / 720)
        small += p < 0.05
    assert small <= 20  # 10 expected


def test_random_permutations_are_never_certain():
    x = np.arange(12.0)
    p, smallest = stats.permutation_p(lambda orders: (x - x.mean())[orders] @ x, 12, repetitions=500)
    assert p == smallest == 1 / 501


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_below_four_clusters_the_mean_has_no_interval(clusters):
    estimate = stats.mean_interval([1.0] * clusters, unit="base models")
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (1.0, None, None, clusters)
    assert estimate.note == f"too few: {clusters} base models, an interval needs 4"


def test_rows_of_one_cluster_count_once():
    estimate = stats.mean_interval([0, 0, 0, 1, 2, 3], ["a", "a", "a", "b", "c", "d"])
    assert estimate.value == 1.5
    assert estimate.high - estimate.value == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-4)


def test_missing_values_are_left_out_and_not_zero():
    assert stats.mean_interval([None, 2.0, float("nan"), 4.0]).value == 3.0
    assert stats.mean_interval([None]).value is None
    assert stats.spearman([1, 2, 3, 4, None], [2, 3, 4, 5, -9]).value == 1.0


def test_too_few_pairs_have_no_rank_correlation():
    assert stats.spearman([1, 2, 3], [1, 2, 3]).value is None
    assert "too few: 3 pairs" in stats.spearman([1, 2, 3], [1, 2, 3]).note
    few = stats.spearman([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5])
    assert few.value == pytest.approx(1 - 6 * 4 / 210)
    assert few.low is None and "an interval needs 10" in few.note
    assert stats.spearman([1] * 6, [1, 2, 3, 4, 5, 6]).note == "one side does not vary"


def test_groups_are_ranked_by_themselves():
    # Within each group y falls with x; pooled it would rise.
    x, y = [1, 2, 3, 4, 11, 12, 13, 14], [4, 3, 2, 1, 14, 13, 12, 11]
    found = stats.spearman_within(x, y, ["a"] * 4 + ["b"] * 4)
    assert {group: estimate.value for group, estimate in found.items()} == pytest.approx({"a": -1.0, "b": -1.0})
