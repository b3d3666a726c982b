"""λ_0 from few responses per prompt: against the exact λ* of a law that all prompts share."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special

from constrained_dpo.dual.one_shot import first_multipliers, solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint

BETA, MARGIN = 0.5, 0.5
PROBLEM = ConstrainedProblem("r", BETA, (Constraint("g", margin=MARGIN),))
LAW = np.random.default_rng(3).normal(size=(2, 400))
REWARD, UTILITY = 0.5 * LAW[0], LAW[1] - 0.3 * LAW[0]


def slack(lambda_: float) -> float:
    weight = special.softmax((REWARD + lambda_ * UTILITY) / BETA)
    return float(weight @ UTILITY - UTILITY.mean() - MARGIN)


EXACT = optimize.brentq(slack, 0, 5)


def drawn(counts: np.ndarray, rng: np.random.Generator) -> ScoreTable:
    """So many responses to each prompt, all from the one law."""
    chosen = rng.integers(400, size=counts.sum())
    prompts = np.repeat(np.arange(len(counts)), counts)
    return ScoreTable.from_columns(prompts, REWARD[chosen], UTILITY[chosen][None])


def test_prompts_with_few_responses_do_not_drown_those_with_many():
    counts = np.r_[np.full(400, 4), np.full(100, 64)]
    table = drawn(counts, np.random.default_rng(0))
    first = first_multipliers(table, PROBLEM)
    assert (first.prompts, first.responses) == (100, 64)
    everything = solve_one_shot(table, PROBLEM).lambda_["g"]
    assert everything > 1.2 * EXACT
    assert first.lambda_["g"] == pytest.approx(EXACT, abs=0.03)


@pytest.mark.parametrize("responses", [16, 32])
def test_the_correction_takes_out_most_of_the_bias_of_few_responses(responses):
    rng = np.random.default_rng(0)
    first = [first_multipliers(drawn(np.full(300, responses), rng), PROBLEM) for _ in range(20)]
    corrected = np.array([f.lambda_["g"] for f in first])
    plain = np.array([f.plain.lambda_["g"] for f in first])
    assert plain.mean() > EXACT + 0.01
    assert abs(corrected.mean() - EXACT) < 0.4 * (plain.mean() - EXACT)


def test_the_correction_stays_within_half_and_twice_the_plain_solution():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first = first_multipliers(drawn(np.full(20, 4), rng), PROBLEM)
        plain = first.plain.lambda_["g"]
        if not first.replaced:
            assert 0.5 * plain <= first.lambda_["g"] <= 2 * plain


def test_levels_that_no_tilt_of_the_samples_reaches_get_the_linear_response():
    """Four responses cannot give a rise of 2 standard deviations; λ is β Var(g)⁻¹ (b − Cov(g, r)/β)
    within prompts, not max_lambda."""
    rng = np.random.default_rng(0)
    g, h = rng.normal(size=(2, 200, 4))
    reward = rng.normal(size=(200, 4))
    table = ScoreTable.from_arrays(reward, np.array([g, h]))
    problem = ConstrainedProblem(
        "r", BETA, (Constraint("g", margin=2.0), Constraint("h", margin=2.5))
    )
    first = first_multipliers(table, problem, max_lambda=100.0)
    assert set(first.replaced) == {"g", "h"}
    columns = [c - c.mean(axis=1, keepdims=True) for c in (g, h, reward)]
    covariance = np.array([[(a * b).sum() for b in columns] for a in columns]) / (200 * 3)
    expected = np.linalg.solve(covariance[:2, :2], BETA * np.array([2.0, 2.5]) - covariance[:2, 2])
    assert first.lambda_.to_numpy() == pytest.approx(expected, rel=1e-6)
    pd.testing.assert_series_equal(first.plain.lambda_, pd.Series({"g": 100.0, "h": 100.0}))


def test_without_constraints_there_is_nothing_to_solve():
    problem = ConstrainedProblem("r", BETA, ())
    table = ScoreTable.from_columns(np.repeat(np.arange(3), 4), np.zeros(12), np.zeros((0, 12)))
    assert first_multipliers(table, problem).lambda_.empty
