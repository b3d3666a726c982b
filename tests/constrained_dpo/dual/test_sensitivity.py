"""How far the one-shot λ* can be trusted: bootstrap, stability, sweep."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.one_shot import first_multipliers, solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.sensitivity import bootstrap_multipliers, stability, sweep
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from tests.helpers.tables import scored_frame


def normal_scores(rng: np.random.Generator, prompts: int, responses: int) -> ScoreTable:
    """Reward and utility of a normal law, alike on every prompt up to a shift of both."""
    shift = rng.normal(size=(prompts, 1))
    reward = rng.normal(size=(prompts, responses))
    utility = -0.6 * reward + 0.8 * rng.normal(size=reward.shape)
    return ScoreTable.from_arrays(reward + shift, (utility + 0.5 * shift)[None])


NORMAL = ConstrainedProblem("r", 0.5, (Constraint("g", margin=0.3),))
# the maximizer's E[g] rises by (Cov(g, r) + λ Var(g))/β, with covariance −0.6 and variance 1
NORMAL_LAMBDA = 0.3 * 0.5 + 0.6


@pytest.mark.slow
def test_the_bootstrap_covers_the_true_multiplier_although_responses_are_few():
    """12 responses per prompt: λ* on them is biased by more than its spread over prompts, and the
    interval covers the true one all the same."""
    rng, covered, plain, replications = np.random.default_rng(0), 0, [], 24
    for _ in range(replications):
        table = normal_scores(rng, 150, 12)
        plain.append(solve_one_shot(table, NORMAL).lambda_["g"])
        interval = bootstrap_multipliers(table, NORMAL, 40, rng).interval
        covered += interval.loc["g", "low"] <= NORMAL_LAMBDA <= interval.loc["g", "high"]
    assert np.mean(plain) > NORMAL_LAMBDA + 1.5 * np.std(plain)
    assert covered >= 0.85 * replications


def test_a_replicate_is_the_corrected_multiplier_of_a_resampled_table():
    table = normal_scores(np.random.default_rng(0), 80, 8)
    draws = np.random.default_rng(7).multinomial(80, np.full(80, 1 / 80))
    chosen = table.take(np.repeat(np.arange(80), draws))
    by_hand = first_multipliers(chosen, NORMAL).lambda_["g"]
    one = bootstrap_multipliers(table, NORMAL, 3, np.random.default_rng(7)).draws["g"]
    assert one[0] == pytest.approx(by_hand, abs=1e-5) and one.nunique() == 3


def test_three_responses_are_too_few_for_an_interval():
    table = normal_scores(np.random.default_rng(0), 20, 3)
    with pytest.raises(UserError, match="3 responses of a prompt are too few to correct"):
        bootstrap_multipliers(table, NORMAL, 3, np.random.default_rng(7))


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
            point.first.lambda_, first_multipliers(table, setting).lambda_, atol=1e-8
        )
    rewards = [p.first.plain.reward - 0.3 * p.first.plain.kl for p in points[::2]]
    assert rewards[0] > rewards[1] > rewards[2]
