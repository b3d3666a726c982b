"""The slack of tails and rates: its parts by hand, and how often its bounds hold."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from constrained_dpo.estimates.slack import (
    changes,
    estimate_subgradient,
    known_bounds,
    prompt_slack,
)
from constrained_dpo.kinds import Measure, tail_mean, tail_point, tail_scores
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.tables import scored_frame

SHARE = 0.1


def problem_of(measure: Measure, margin: float = 0.3) -> ConstrainedProblem:
    name = f"g.{measure.kind}"
    return ConstrainedProblem("r", 0.5, (Constraint(name, margin=margin, measure=measure),))


def test_a_slack_is_the_policys_tail_less_the_references_own():
    samples, reference = scored_frame(1, 12, 50), scored_frame(2, 12, 40)
    problem = problem_of(Measure("tail", SHARE, -1.0))
    u = prompt_slack(samples, reference, problem)["g.tail"].mean()
    policy = tail_scores(samples["g"].to_numpy(), -1.0, SHARE).mean()
    base = tail_mean(reference["g"].to_numpy(), np.ones(480), SHARE)
    assert u == pytest.approx(policy - base - 0.3)
    table = estimate_subgradient(samples, reference, problem).loc["g.tail"]
    assert table["u"] == pytest.approx(u)
    # at the samples' quantile the mean is the tail itself, and no point gives a higher one
    tail_slack = prompt_slack(samples, reference, problem.at_tails_of(samples))["g.tail"].mean()
    assert tail_slack == pytest.approx(
        tail_mean(samples["g"].to_numpy(), np.ones(600), SHARE) - base - 0.3
    )
    assert tail_slack > u
    ends = {"g.tail": (-30.0, 10.0)}
    table, moved = (
        estimate_subgradient(samples, reference, p, bounds=ends).loc["g.tail"]
        for p in (problem, problem.at_tails_of(samples))
    )
    assert table["high"] == pytest.approx(moved["high"])
    assert table["low"] < moved["low"]
    change = changes(samples, reference, problem.at_tails_of(samples), 0.95)["g.tail"]
    assert change.difference == pytest.approx(tail_slack + 0.3)
    assert change.reference == pytest.approx(base)


def test_prompts_count_alike_however_many_responses_they_have():
    frame = scored_frame(3, 4, 30)
    uneven = frame[(frame["prompt_id"] != "p0") | (frame.groupby("prompt_id").cumcount() < 10)]
    problem = problem_of(Measure("tail", SHARE)).at_tails_of(uneven)
    weights = np.where(uneven["prompt_id"] == "p0", 1 / 10, 1 / 30)
    assert problem.tail_points["g.tail"] == tail_point(uneven["g"].to_numpy(), weights, SHARE)


def test_ranges_bound_the_slack_of_tails_and_rates():
    (low, high) = known_bounds(problem_of(Measure("rate", at=0.2)), {"g.rate": (-3, 3)})["g.rate"]
    assert (low, high) == (-1.3, 0.7)
    tail = problem_of(Measure("tail", SHARE, -0.5))
    (low, high) = known_bounds(tail, {"g.tail": (-1.0, 1.0)})["g.tail"]
    worst = -0.5 - 0.5 / SHARE
    assert low == pytest.approx(worst - 1.0 - 0.3)
    assert high == pytest.approx(1.0 - (1.0 - 2.0 / SHARE) - 0.3)
    rng = np.random.default_rng(0)
    for _ in range(20):  # no draw leaves them
        frames = [
            pd.DataFrame({"prompt_id": np.repeat(["a", "b"], 5), "g": rng.choice([-1.0, 1.0], 10)})
            for _ in range(2)
        ]
        slack = prompt_slack(*frames, tail)["g.tail"]
        assert slack.between(low, high).all()
    assert known_bounds(tail, {})["g.tail"] == (-np.inf, np.inf)


POPULATION, PROMPTS, RESPONSES, REPLICATES = 4000, 80, 16, 200


def population(seed: int, tail: float) -> np.ndarray:
    """Scores of 64 equally likely answers to every prompt, with a lower tail that grows with
    `tail`, (POPULATION, 64)."""
    rng = np.random.default_rng(seed)
    prompts = rng.normal(size=(POPULATION, 1)) * 0.5
    return (
        prompts
        + rng.normal(size=(POPULATION, 64))
        - tail * rng.exponential(size=(POPULATION, 64)) * (rng.random((POPULATION, 64)) < 0.15)
    )


def answers(scores: np.ndarray, prompts: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    cells = rng.integers(64, size=(len(prompts), RESPONSES))
    names = np.repeat([f"p{i}" for i in range(len(prompts))], RESPONSES)
    return pd.DataFrame({"prompt_id": names, "g": scores[prompts[:, None], cells].ravel()})


@pytest.mark.slow
@pytest.mark.parametrize("tails", [(1.0, 2.0), (2.0, 1.0)])
def test_bounds_of_a_tail_hold_as_often_as_they_say(tails):
    """One-sided bounds at 95 % are wrong in at most 5 % of the draws, up to a chance of one in a
    thousand."""
    policy, base = (population(seed, tail) for seed, tail in enumerate(tails, start=3))
    ones = np.ones(policy.size)
    truth = tail_mean(policy.ravel(), ones, SHARE) - tail_mean(base.ravel(), ones, SHARE)
    rng, above, below = np.random.default_rng(11), 0, 0
    for _ in range(REPLICATES):
        dual, test = rng.integers(POPULATION, size=(2, PROMPTS))
        problem = problem_of(Measure("tail", SHARE), truth)
        problem = problem.at_tails_of(answers(policy, dual, rng))
        samples, reference = (answers(scores, test, rng) for scores in (policy, base))
        row = estimate_subgradient(samples, reference, problem).loc["g.tail"]
        above += row["one_low"] > 0  # claims that the true slack of 0 is more
        below += row["each_high"] < 0
    for wrong in (above, below):
        assert binomtest(wrong, REPLICATES, 0.05, alternative="greater").pvalue > 1e-3
    assert above + below > 0  # bounds that never fail would say nothing
