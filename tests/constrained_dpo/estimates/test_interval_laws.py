"""What intervals promise, by seeded simulation.

False satisfied: the lower end of the interval at confidence 0.90, a one-sided bound at 5 %, is
above 0 although the true mean is 0.
"""

import numpy as np
import pytest
from scipy import stats

from constrained_dpo.estimates.intervals import mean_interval, spent_confidence, t_interval

INF = float("inf")
LIKERT = np.arange(5.0)
RARE_4 = np.array([0.50, 0.30, 0.15, 0.03, 0.02])
GAP = 10 * 0.05 / 0.95


def shares(level: float, responses: int, pull: float | None = None):
    """Values and probabilities of a prompt's share of accepted responses, less the level; pull:
    the prompts differ, by a beta law."""
    kept = np.arange(responses + 1)
    if pull is None:
        probabilities = stats.binom.pmf(kept, responses, level)
    else:
        probabilities = stats.betabinom.pmf(kept, responses, pull * level, pull * (1 - level))
    return kept / responses - level, probabilities


# name: values of the law, their probabilities, and the bounds
TABLES = {
    "indicator .9": (*shares(0.9, 1), (-0.9, 0.1)),
    "indicator .97": (*shares(0.97, 1), (-0.97, 0.03)),
    "indicator .9, wider range": (*shares(0.9, 1), (-1.5, 0.5)),
    "K = 4": (*shares(0.9, 4), (-0.9, 0.1)),
    "K = 4, prompts differ": (*shares(0.9, 4, 2.0), (-0.9, 0.1)),
    "K = 8": (*shares(0.9, 8), (-0.9, 0.1)),
    "K = 8, prompts differ": (*shares(0.9, 8, 1.0), (-0.9, 0.1)),
    "5 % at -10": (np.array([-10, GAP]), np.array([0.05, 0.95]), (-10, GAP)),
    "5 % at -10, wider range": (np.array([-10, GAP]), np.array([0.05, 0.95]), (-15, 5)),
    "a rare 4": (LIKERT - LIKERT @ RARE_4, RARE_4, (-LIKERT @ RARE_4, 4 - LIKERT @ RARE_4)),
    "a rare 0": (LIKERT @ RARE_4 - LIKERT, RARE_4, (LIKERT @ RARE_4 - 4, LIKERT @ RARE_4)),
}
OPEN_LAWS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.05),
    "Student t, 3 df": (lambda rng, shape: rng.standard_t(3, shape), 0.05),
    "lognormal, lower tail": (lambda rng, shape: np.exp(0.5) - rng.lognormal(0, 1, shape), 0.10),
}


def slack(limit: float, count: int) -> float:
    """Two standard errors of a simulated share."""
    return float(2 * np.sqrt(limit * (1 - limit) / count))


def simulated(name: str, count: int, repetitions: int, confidence: float, one_end: bool = False):
    """Intervals (kinds, 2) of samples of a table's law, and how often each kind of sample came."""
    values, probabilities, bounds = TABLES[name]
    rng = np.random.default_rng([count, list(TABLES).index(name)])
    counts = rng.multinomial(count, probabilities, repetitions)
    kinds, times = np.unique(counts, axis=0, return_counts=True)
    bounds = (bounds[0], INF) if one_end else bounds  # the lower end does not use the other bound
    ends = [mean_interval(np.repeat(values, kind), confidence, bounds) for kind in kinds]
    return np.array(ends), times / repetitions


TWO_VALUED = [name for name, (values, _, _) in TABLES.items() if len(values) == 2]
CELLS = [(name, count, 20_000, 20_000) for name in TWO_VALUED for count in (8, 16, 24, 40, 96, 300)]
CELLS += [(name, 8, 1500, 500) for name in TABLES if name not in TWO_VALUED]
CELLS += [(name, 40, 300, 0) for name in TABLES if name not in TWO_VALUED]


@pytest.mark.parametrize(("name", "count", "for_false", "for_coverage"), CELLS)
def test_false_satisfied_and_coverage_with_a_range(name, count, for_false, for_coverage):
    ends, share = simulated(name, count, for_false, 0.9, one_end=True)
    assert share @ (ends[:, 0] > 0) <= 0.05 + slack(0.05, for_false)
    if for_coverage:
        ends, share = simulated(name, count, for_coverage, 0.95)
        covered = share @ ((ends[:, 0] <= 0) & (ends[:, 1] >= 0))
        assert covered >= 0.93 - slack(0.93, for_coverage)


@pytest.mark.parametrize(("count", "repetitions"), [(8, 800), (40, 300)])
def test_a_clipped_skewed_score(count, repetitions):
    rng = np.random.default_rng(count)
    mean = np.exp(0.5) * stats.norm.cdf(np.log(6) - 1) + 6 * stats.norm.sf(np.log(6))
    slacks = mean - np.minimum(rng.lognormal(size=(repetitions, count)), 6)
    lows = np.array([mean_interval(row, 0.9, (mean - 6, INF))[0] for row in slacks])
    assert (lows > 0).mean() <= 0.05 + slack(0.05, repetitions)


@pytest.mark.parametrize("name", OPEN_LAWS)
@pytest.mark.parametrize("count", [8, 16, 96])
def test_false_satisfied_and_coverage_without_a_range(name, count):
    draw, limit = OPEN_LAWS[name]
    samples = draw(np.random.default_rng([count, list(OPEN_LAWS).index(name)]), (2000, count))
    lows = np.array([mean_interval(row, 0.9)[0] for row in samples])
    assert (lows > 0).mean() <= limit + slack(limit, 2000)
    if limit == 0.05:
        low, high = np.array([mean_interval(row, 0.95) for row in samples[:1000]]).T
        assert ((low <= 0) & (high >= 0)).mean() >= 0.93 - slack(0.93, 1000)


def test_power_is_that_of_the_exact_binomial_test():
    kept = np.arange(97)
    lows = [mean_interval((np.arange(96) < k) - 0.95, 0.9, (-0.95, 0.05))[0] for k in kept]
    power = stats.binom.pmf(kept, 96, 0.99) @ (np.array(lows) > 0)
    assert power == pytest.approx(stats.binom.cdf(1, 96, 0.01))  # at most one failure: 75 %
    assert power >= 0.70


@pytest.mark.parametrize(("count", "limit"), [(40, 1.06), (96, 1.03)])
def test_width_on_normal_numbers_without_a_range(count, limit):
    samples = np.random.default_rng(count).normal(size=(300, count))
    ratio = [np.ptp(mean_interval(x)) / np.ptp(t_interval(x)) for x in samples]
    assert min(ratio) >= 1 - 1e-12  # never narrower than Student's
    assert np.mean(ratio) <= limit


def test_width_on_normal_numbers_with_a_range():
    # The price of one more observation, 3 standard deviations off, falls with 1 / sqrt(N).
    samples = np.clip(np.random.default_rng(0).normal(size=(60, 300)), -3, 3)
    ratio = [np.ptp(mean_interval(x, 0.95, (-3, 3))) / np.ptp(t_interval(x)) for x in samples]
    assert np.mean(ratio) <= 1.12


def test_looks_over_24_rounds():
    """A policy at its level in every round, on fresh prompts: some round is "satisfied"."""
    passed = np.random.default_rng(24).binomial(96, 0.9, size=(5000, 24))
    once, spent = np.zeros((2, 5000), dtype=bool)
    for look in range(1, 25):
        for spend, hits in ((False, once), (True, spent)):
            confidence = spent_confidence(0.9, look) if spend else 0.9
            lows = [
                mean_interval((np.arange(96) < k) - 0.9, confidence, (-0.9, 0.1))[0]
                for k in range(97)
            ]
            hits |= np.array(lows)[passed[:, look - 1]] > 0
    assert spent.mean() <= 0.05 + slack(0.05, 5000)
    assert once.mean() > 0.3  # what the looks are for
