"""Intervals beside exact oracles, and their edge cases; what they promise is simulated in
`test_interval_laws`."""

import numpy as np
import pytest
from scipy import stats

from constrained_dpo.estimates.intervals import (
    mean_interval,
    proportion_interval,
    spent_confidence,
    t_interval,
)
from constrained_dpo.monte_carlo import standard_error
from data_prep.errors import UserError

INF = float("inf")


def weighted_mean_cdf(point: float, knots: np.ndarray) -> float:
    """P(mean of knots <= point) at Dirichlet(1, ..., 1) weights, by the recursion of B-splines.

    The mean's density is a B-spline (Curry and Schoenberg), its integral a sum of B-splines one
    degree higher, which de Boor's recursion sums without cancellation: another way to the number
    that `mean_interval` finds by inversion of a transform.
    """
    knots = np.sort(knots)
    degree = len(knots) - 1
    ends = np.ones(degree + 1)
    extended = np.concatenate([(knots[0] - 1) * ends, knots, (knots[-1] + 1) * ends])
    place = int(np.searchsorted(extended, point, side="right")) - 1
    values = (np.arange(place - degree, place + 1) > degree).astype(float)
    for order in range(1, degree + 1):
        j = np.arange(order, degree + 1)
        left, right = extended[j + place - degree], extended[j + 1 + place - order]
        share = (point - left) / (right - left)
        values[order:] = (1 - share) * values[order - 1 : -1] + share * values[order:]
    return float(values[-1])


# Exact oracles


@pytest.mark.parametrize("trials", [1, 2, 7, 40, 300, 10_000])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.9999])
def test_two_valued_numbers_have_clopper_and_pearsons_interval(trials, confidence):
    for successes in {0, 1, trials // 2, trials - 1, trials}:
        values = (np.arange(trials) < successes) - 0.9
        exact = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
        assert mean_interval(values, confidence, (-0.9, 0.1)) == pytest.approx(
            (exact.low - 0.9, exact.high - 0.9), abs=1e-10
        )
        assert proportion_interval(successes, trials, confidence) == pytest.approx(
            (exact.low, exact.high), abs=1e-12
        )


def numbers_of(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    return {
        "uniform": lambda: rng.random(count),
        "many scales": lambda: np.exp(-rng.exponential(5, count)),
        "two heaps": lambda: rng.beta(0.1, 0.1, count),
        "Likert": lambda: rng.integers(0, 5, count) / 4,
        "one far above": lambda: np.append(0.01 * rng.random(count - 1), 1.0),
        "one far below": lambda: np.append(1 - 0.01 * rng.random(count - 1), 0.0),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["uniform", "many scales", "two heaps", "Likert", "one far above", "one far below"]
)
@pytest.mark.parametrize("count", [2, 3, 8, 40, 300])
def test_the_ends_are_quantiles_of_the_weighted_mean(kind, count):
    values = numbers_of(kind, count)
    for confidence in (0.9, 0.95, 1 - 1e-6):
        low, high = mean_interval(values, confidence, (-0.5, 1.5))
        tail = (1 - confidence) / 2
        below = weighted_mean_cdf(low, np.append(values, -0.5))
        above = weighted_mean_cdf(-high, np.append(-values, -1.5))
        # The numbers are rounded to 12 digits of their range, and P is steep.
        assert (below, above) == pytest.approx((tail, tail), rel=1e-8)


def test_many_prompts():
    values = numbers_of("uniform", 2000)
    low, _ = mean_interval(values, 0.9, (0, 1))
    assert weighted_mean_cdf(low, np.append(values, 0)) == pytest.approx(0.05, rel=1e-8)
    values = numbers_of("uniform", 20_000)
    assert mean_interval(values, 0.9, (0, 1)) == pytest.approx(t_interval(values, 0.9), abs=1e-4)


def test_the_end_agrees_with_simulated_weights():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    low, high = mean_interval(values, 0.9, (-4, 4))
    weights = rng.dirichlet(np.ones(13), 200_000)
    for share in (
        (weights @ np.append(values, -4) <= low).mean(),
        (weights @ np.append(values, 4) >= high).mean(),
    ):
        assert share == pytest.approx(0.05, abs=1e-3)  # two standard errors


@pytest.mark.parametrize("bounds", [None, (-6.0, 5.0), (-6.0, INF), (-INF, 5.0)])
def test_shift_scale_mirror_and_order(bounds):
    values = np.random.default_rng(1).normal(size=30)
    low, high = mean_interval(values, 0.95, bounds)
    moved = None if bounds is None else (3 * bounds[0] + 7, 3 * bounds[1] + 7)
    assert mean_interval(3 * values + 7, 0.95, moved) == pytest.approx((3 * low + 7, 3 * high + 7))
    mirrored = None if bounds is None else (-bounds[1], -bounds[0])
    assert mean_interval(-values, 0.95, mirrored) == pytest.approx((-high, -low))
    assert mean_interval(values, 0.95, bounds) == (low, high)  # to the last bit
    if bounds == (-6.0, 5.0):
        assert mean_interval(values[::-1], 0.95, bounds) == (low, high)


def test_monotone_in_values_bounds_confidence_and_looks():
    values = np.random.default_rng(2).normal(size=20)
    low, high = mean_interval(values, 0.9, (-5, 5))
    for place in range(len(values)):
        raised = values.copy()
        raised[place] += 0.3
        assert mean_interval(raised, 0.9, (-5, 5)) > (low, high)
        assert mean_interval(raised, 0.9, (-5, 5))[1] > high
    for wider in (
        mean_interval(values, 0.9, (-6, 6)),
        mean_interval(values, 0.95, (-5, 5)),
        mean_interval(values, 0.9, (-5, 5), looks=2),
    ):
        assert wider[0] < low < high < wider[1]


def test_looks_spend_the_error_probability():
    alphas = [1 - spent_confidence(0.95, look) for look in range(1, 100_001)]
    # The rest of the series lies between alpha 6 / pi^2 times 1 / 100,001 and 1 / 100,000.
    assert sum(alphas) == pytest.approx(0.05 * (1 - 6 / np.pi**2 * 1e-5), abs=1e-9)
    values = np.random.default_rng(3).normal(size=30)
    for bounds in (None, (-5, 5)):
        for look in (2, 5, 24):
            spent = mean_interval(values, spent_confidence(0.9, look), bounds)
            assert mean_interval(values, 0.9, bounds, looks=look) == spent
        first = mean_interval(values, spent_confidence(0.9, 1), bounds)
        only = mean_interval(values, 0.9, bounds)
        assert first[0] < only[0] < only[1] < first[1]


def test_without_a_range_no_spread_is_no_knowledge():
    for values in ([], [0.3], [0.3] * 50, [0.1 + 0.2, 0.3, 0.3]):
        assert mean_interval(values) == (-INF, INF)
    assert t_interval([0.3] * 5) == (-INF, INF)


def test_with_a_range_no_spread_leaves_the_added_observation():
    low, high = mean_interval([0.05] * 59, 0.9, (-0.95, 0.05))
    assert (low, high) == (pytest.approx(-0.95 + 0.05 ** (1 / 59)), 0.05)
    assert low > 0 > mean_interval([0.05] * 58, 0.9, (-0.95, 0.05))[0]  # the rule of 59
    assert mean_interval([0.5], 0.9, (0, 1)) == pytest.approx((0.5 * 0.05, 1 - 0.5 * 0.05))
    assert mean_interval([], 0.9, (0, 1)) == (0, 1)
    assert mean_interval([2.0, 2.0], 0.9, (2, 2)) == (2, 2)


def test_a_range_with_one_end():
    values = np.random.default_rng(4).normal(size=30)
    both, neither = mean_interval(values, 0.9, (-5, 5)), mean_interval(values, 0.9)
    assert mean_interval(values, 0.9, (-5, INF)) == (both[0], neither[1])
    assert mean_interval(values, 0.9, (-INF, 5)) == (neither[0], both[1])
    assert mean_interval([1.0] * 9, 0.9, (-5, INF)) == (
        mean_interval([1.0] * 9, 0.9, (-5, 1))[0],
        INF,
    )


def test_values_at_the_bound_do_not_satisfy():
    assert mean_interval([0.0] * 1000, 0.9, (0, 1))[0] == 0
    assert mean_interval([0.0] * 1000, 0.9, (-1, 0))[1] == 0
    rounded = [0.1 + 0.2 - 0.3] * 3 + [0.4]  # 5.6e-17 below the slack's range of (0, 0.4)
    low, high = mean_interval(-np.array(rounded), 0.9, (-0.4, 0))
    assert -0.4 < low < high <= 0


def test_the_interval_lies_inside_the_bounds():
    rng = np.random.default_rng(5)
    for count in (1, 2, 5, 30):
        values = rng.beta(0.2, 0.2, count) - 0.3
        for confidence in (0.5, 0.95, 1 - 1e-9):
            low, high = mean_interval(values, confidence, (-0.3, 0.7))
            assert -0.3 <= low < values.mean() < high <= 0.7


def test_two_values_without_a_range_have_students_interval():
    assert mean_interval([0.0, 1.0], 0.9) == pytest.approx(t_interval([0.0, 1.0], 0.9))


def test_mistakes():
    with pytest.raises(UserError, match=r"a value of 5 lies outside the bounds \(0, 4\)"):
        mean_interval([1.0, 5.0], 0.9, (0, 4))
    for values in ([1.0, np.nan], [[1.0, 2.0]], [INF, 1.0]):
        with pytest.raises(ValueError, match="one finite number per unit"):
            mean_interval(values)
    for confidence in (0.0, 1.0, 95.0, np.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            mean_interval([1.0, 2.0], confidence)
    for bounds in ((4, 0), (np.nan, 1)):
        with pytest.raises(ValueError, match="bounds must be"):
            mean_interval([1.0, 2.0], 0.9, bounds)
    with pytest.raises(ValueError, match="counted from 1"):
        mean_interval([1.0, 2.0], 0.9, looks=0)
    with pytest.raises(ValueError, match="at least 2 runs"):
        t_interval([1.0])
    for successes, trials in ((-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="cannot be"):
            proportion_interval(successes, trials)


def test_proportions_without_trials():
    assert proportion_interval(0, 0) == (0, 1)


def test_students_interval_and_the_standard_error():
    values = np.random.default_rng(6).normal(size=5)
    exact = stats.t.interval(0.9, 4, values.mean(), stats.sem(values))
    assert t_interval(values, 0.9) == pytest.approx(exact)
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error([3.0]) == standard_error([]) == INF
    assert standard_error([3.0, 3.0]) == 0
