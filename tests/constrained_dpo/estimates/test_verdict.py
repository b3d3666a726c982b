"""Verdicts: the words against their bounds, and what they promise, by simulation."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.slack import estimate_subgradient
from constrained_dpo.estimates.verdict import (
    SATISFIED,
    UNDECIDED,
    VIOLATED,
    front_confidence,
    judge,
    look_confidence,
    overall,
)
from constrained_dpo.problem import ConstrainedProblem, Constraint


def frame(*rows: tuple[float, float, float]) -> pd.DataFrame:
    """Bounds (one_low, each_low, each_high) of one constraint a row."""
    index = [f"g{i}" for i in range(len(rows))]
    return pd.DataFrame(rows, columns=["one_low", "each_low", "each_high"], index=index)


def test_words_follow_the_bounds():
    clear, near, bad = (0.2, 0.1, 0.5), (0.1, -0.1, 0.4), (-0.5, -0.6, -0.1)
    none = (-0.2, -0.3, 0.1)
    assert list(judge(frame(clear, near, bad, none)).values()) == [
        SATISFIED,
        UNDECIDED,
        VIOLATED,
        UNDECIDED,
    ]
    assert overall(frame(clear, near)) == SATISFIED  # no bound pays for the others
    assert overall(frame(clear, none)) == UNDECIDED
    assert overall(frame(clear, bad)) == overall(frame(none, bad)) == VIOLATED
    assert overall(frame((0.0, 0.0, 1.0))) == UNDECIDED


@pytest.mark.parametrize("planned", [1, 6, 24])
def test_a_run_spends_its_error_probability_once(planned):
    """However many rounds and points of fronts look at the test prompts, in whatever order."""
    spent = [1 - look_confidence(0.95, look, planned) for look in range(1, 100_001)]
    points = [1 - front_confidence(0.95, look, planned) for look in range(1, 100_001)]
    together = sum(spent) + sum(points)
    assert together <= 0.05 and together == pytest.approx(0.05, abs=1e-6)
    assert spent[planned - 1] == pytest.approx(0.025)
    assert all(later < sooner for sooner, later in pairwise(points[:1000]))


def bounds_by_count(count: int, level: float) -> pd.DataFrame:
    """`estimate_subgradient` of one of two constraints, by how many of `count` prompts meet it."""
    problem = ConstrainedProblem(
        "r", 1.0, (Constraint("g0", None, level), Constraint("g1", None, level))
    )
    bounds, rows = dict.fromkeys(problem.names, (-level, 1 - level)), []
    for passed in range(count + 1):
        met = (np.arange(count) < passed).astype(float)
        samples = pd.DataFrame({"prompt_id": np.arange(count).astype(str), "g0": met, "g1": met})
        u = estimate_subgradient(samples, samples, problem, 0.95, bounds)
        assert u.loc["g0"].equals(u.loc["g1"].rename("g0"))
        rows.append(u.iloc[0])
    return pd.DataFrame(rows)


def test_one_word_for_two_constraints_is_wrong_in_5_percent_and_more_powerful_than_bonferroni():
    """One constraint at its level, the other far above: *satisfied* is wrong. With both at true
    room: power, beside that of a Bonferroni bound for each."""
    bounds, runs = bounds_by_count(96, 0.9), 4000
    counts = np.random.default_rng(0).binomial(96, [[0.9, 0.999]] * runs)
    called = [overall(bounds.iloc[pair]) == SATISFIED for pair in counts]
    assert np.mean(called) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    law = stats.binom.pmf(np.arange(97), 96, 0.97)
    ours, bonferroni = ((law @ (bounds[end] > 0)) ** 2 for end in ("one_low", "each_low"))
    both = [overall(bounds.iloc[[k, k]]) == SATISFIED for k in range(97)]
    assert law @ np.array(both) == pytest.approx(np.sqrt(ours)) and ours > bonferroni + 0.1


def test_some_round_of_a_run_is_wrongly_satisfied_in_5_percent():
    """A policy at its level in each of six rounds, on fresh samples of the same prompts."""
    runs, rounds, passed = 4000, 6, np.arange(97)
    rng, wrong = np.random.default_rng(1), np.zeros(4000, dtype=bool)
    plain = np.zeros(runs, dtype=bool)
    for look in range(1, rounds + 1):
        counts = rng.binomial(96, 0.9, runs)
        for hits, error in ((wrong, 1 - look_confidence(0.95, look, rounds)), (plain, 0.05)):
            lows = [
                mean_interval((np.arange(96) < k) - 0.9, 1 - 2 * error, (-0.9, 0.1))[0]
                for k in passed
            ]
            hits |= np.array(lows)[counts] > 0
    assert wrong.mean() <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert plain.mean() > 0.1
