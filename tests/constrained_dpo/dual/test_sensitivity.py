"""How far the one-shot λ* can be trusted: bootstrap, stability, sweep."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.sensitivity import bootstrap_multipliers, stability, sweep
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.tables import scored_frame


def test_bootstrap_interval_covers_and_its_replicates_are_resampled_tables():
    """Prompts drawn from a population of 4000: the interval of λ* covers the population's λ*."""
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(4000, 1))
    reward = rng.normal(size=(4000, 6)) + shift
    utilities = (-0.6 * reward + rng.normal(size=(4000, 6)) + 0.5 * shift)[None]
    problem = ConstrainedProblem("r", 0.5, (Constraint("g", margin=0.3),))
    population = ScoreTable.from_arrays(reward, utilities)
    truth, covered, replications = solve_one_shot(population, problem).lambda_["g"], 0, 60
    for _ in range(replications):
        table = population.take(rng.integers(0, 4000, 80))
        solution = solve_one_shot(table, problem)
        interval = bootstrap_multipliers(table, problem, solution, 40, rng).interval
        covered += interval.loc["g", "low"] <= truth <= interval.loc["g", "high"]
    # 95 % ± 3 standard errors of so many replications; percentile intervals run a little low
    assert 0.86 <= covered / replications <= 0.99
    # One replicate by hand: the solver on the table with the prompts that were drawn.
    draws = np.random.default_rng(7).multinomial(80, np.full(80, 1 / 80))
    by_hand = solve_one_shot(table.take(np.repeat(np.arange(80), draws)), problem).lambda_["g"]
    one = bootstrap_multipliers(table, problem, solution, 3, np.random.default_rng(7)).draws["g"]
    assert one[0] == pytest.approx(by_hand, abs=1e-6) and one.nunique() == 3


def test_stability_shows_the_bias_of_few_responses_and_the_noise_of_few_prompts():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(800, 64))
    table = ScoreTable.from_arrays(reward, (-0.6 * reward + 0.8 * rng.normal(size=(800, 64)))[None])
    problem = ConstrainedProblem("r", 0.2, (Constraint("g", margin=0.4),))
    parts = stability(table, problem, rng).set_index(["num_prompts", "num_responses"])
    assert len(parts) == 16 and (parts["repeats"].drop((800, 64)) == 10).all()
    whole = solve_one_shot(table, problem).lambda_["g"]
    assert parts.loc[(800, 64), "mean"] == whole and np.isnan(parts.loc[(800, 64), "sd"])
    assert parts.loc[(100, 64), "sd"] > parts.loc[(400, 64), "sd"]
    by_responses = [abs(parts.loc[(800, k), "mean"] - whole) for k in (8, 16, 32)]
    assert by_responses[0] > by_responses[1] > by_responses[2] > 0


def test_sweep_equals_one_solve_per_setting_and_trades_reward_for_utility():
    frame = scored_frame(1, 200, 16, ("r", "g", "h"))
    problem = ConstrainedProblem(
        "r", 0.3, (Constraint("g", margin=0.0), Constraint("h", threshold=0.1))
    )
    table = ScoreTable.from_frame(frame, problem)
    points = list(sweep(table, problem, {"g": [0.0, 0.3, 0.6], "h": [0.1, 0.2]}))
    assert [tuple(p.bounds) for p in points] == [
        (g, h) for g in (0.0, 0.3, 0.6) for h in (0.1, 0.2)
    ]
    for point in points:
        setting = ConstrainedProblem(
            "r",
            0.3,
            (
                Constraint("g", margin=point.bounds["g"]),
                Constraint("h", threshold=point.bounds["h"]),
            ),
        )
        pd.testing.assert_series_equal(
            point.solution.lambda_, solve_one_shot(table, setting).lambda_, atol=1e-9
        )
    rewards = [p.solution.reward - 0.3 * p.solution.kl for p in points[::2]]
    assert rewards[0] > rewards[1] > rewards[2]
