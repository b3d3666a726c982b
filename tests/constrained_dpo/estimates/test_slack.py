"""u from samples against the exact slack of an enumerated world."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.slack import (
    bounded_constraints,
    changes,
    estimate_subgradient,
    known_bounds,
    prompt_slack,
    reference_slack,
    slack_bounds,
)
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from tests.helpers.tables import random_world, scored_frame

REPLICATIONS = 64


@pytest.fixture(scope="module")
def drawn():
    """A world, a policy's table, and pairs of samples of that policy and of π_ref."""
    world, rng = random_world(7, 2, prompts=30), np.random.default_rng(0)
    policy = world.maximizer(pd.Series({"g0": 0.4, "g1": 0.2}))

    def draw(logp, count=8):
        tables, columns = [], [rng.choice(200, (REPLICATIONS, count), p=np.exp(p)) for p in logp]
        ids = np.repeat([f"p{i}" for i in range(len(logp))], count)
        for chosen in np.stack(columns, axis=1):
            scores = {n: np.take_along_axis(g, chosen, 1) for n, g in world.utilities.items()}
            tables.append(
                pd.DataFrame({"prompt_id": ids} | {n: v.ravel() for n, v in scores.items()})
            )
        return tables

    return world, policy, list(zip(draw(policy), draw(world.ref_logp), strict=True))


@pytest.mark.parametrize(
    "level", [{"margin": 0.4}, pytest.param({"threshold": 0.1}, marks=pytest.mark.slow)], ids=str
)
def test_monte_carlo_subgradient_is_unbiased_and_its_interval_covers(drawn, level):
    world, policy, pairs = drawn
    constraints = Constraint("g0", **level), Constraint("g1", margin=0.2)
    problem = ConstrainedProblem("r", world.problem.beta, constraints)
    world = TabularWorld(problem, world.ref_logp, world.reward, world.utilities)
    exact = pd.Series(world.evaluate(policy).u)
    estimates = [estimate_subgradient(*pair, problem) for pair in pairs]
    slack = pd.DataFrame([e["u"] for e in estimates])
    error = slack.std() / np.sqrt(REPLICATIONS)
    assert ((slack.mean() - exact).abs() < 4 * error).all() and (error < 0.04).all()
    # Conditional on the prompts the clustered interval is conservative (it also holds for fresh
    # prompts).
    covered = [(e["low"] <= exact) & (exact <= e["high"]) for e in estimates]
    assert np.mean(covered) >= 0.93


def test_subgradient_refuses_other_prompts():
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.1),))
    frame = scored_frame(0, 4, 3)
    with pytest.raises(UserError, match="paired difference"):
        estimate_subgradient(frame, frame[frame["prompt_id"] != "p0"], problem)


TWO = ConstrainedProblem(
    "r", 1.0, (Constraint("likert", margin=0.5), Constraint("share", threshold=0.9))
)


def test_a_scores_range_bounds_a_prompts_slack():
    ranges = {"likert": (0.0, 4.0), "share": (0.0, np.inf)}
    assert known_bounds(TWO, ranges) == {"likert": (-4.5, 3.5), "share": (-0.9, np.inf)}
    assert bounded_constraints(TWO, ranges) == {"likert"}
    assert bounded_constraints(TWO, {}) == frozenset()


def test_what_no_range_bounds_is_bounded_by_all_that_was_seen():
    seen = [
        pd.DataFrame({"likert": [-1.0, 2.0], "share": [-0.5, 0.1]}),
        pd.DataFrame({"likert": [-3.0, 0.0], "share": [-0.4, 0.05]}),
    ]
    assert slack_bounds(TWO, {"share": (0.0, 1.0)}, seen) == {
        "likert": (-3.0, 2.0),
        "share": (-0.9, pytest.approx(0.1)),
    }


def test_the_reference_policy_against_itself():
    """Of three responses the second is set against the mean of the others; one alone is left
    out."""
    table = pd.DataFrame(
        {"prompt_id": ["a", "a", "a", "b"], "likert": [1.0, 2.0, 4.0, 3.0], "share": 1.0}
    )
    slack = reference_slack(table, TWO)
    assert slack.index.tolist() == ["a"]
    assert slack.loc["a"].tolist() == pytest.approx([(1 + 4) / 2 - 2 - 0.5, 0.1])


def test_a_prompt_that_nobody_has_seen_fail_is_not_taken_for_impossible():
    """All 24 prompts meet their level, at which a share of .97 may be: *satisfied* would be wrong
    in 48 of 100 runs. The score's range alone widens the interval."""
    samples = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(24)], "g": 1.0, "r": 0.0})
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", threshold=0.97),))
    slack = prompt_slack(samples, samples, problem)
    bounds = slack_bounds(problem, {"g": (0.0, 1.0)}, [slack])
    with_range = estimate_subgradient(samples, samples, problem, 0.95, bounds).loc["g"]
    assert with_range["one_low"] == pytest.approx(0.05 ** (1 / 24) - 0.97) and with_range["u"] > 0
    assert with_range["one_low"] < 0 and with_range["high"] == pytest.approx(0.03)


@pytest.mark.parametrize(("share", "count"), [(0.9, 8), (0.9, 24), (0.97, 24), (0.97, 40)])
def test_indicators_at_their_level_are_called_satisfied_in_5_percent(share, count):
    """u = 0, K = 1: false *satisfied* by enumeration of the binomial law."""
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", threshold=share),))
    ids, wrong = [f"p{i}" for i in range(count)], 0.0
    law = np.array([1.0])
    for _ in range(count):
        law = np.convolve(law, [1 - share, share])
    for passed, probability in enumerate(law):
        samples = pd.DataFrame(
            {"prompt_id": ids, "g": (np.arange(count) < passed).astype(float), "r": 0.0}
        )
        bounds = slack_bounds(problem, {"g": (0, 1)}, [prompt_slack(samples, samples, problem)])
        u = estimate_subgradient(samples, samples, problem, 0.95, bounds)
        wrong += probability * (u.loc["g", "one_low"] > 0)
    assert wrong <= 0.05


def test_changes_are_paired_differences_within_their_ranges():
    samples, reference = scored_frame(1, 12, 4), scored_frame(2, 12, 4)
    problem = ConstrainedProblem("r", 1.0, ())
    change = changes(samples, reference, problem, 0.9, {"r": (-9.0, 9.0)})["r"]
    differences = (
        samples.groupby("prompt_id")["r"].mean() - reference.groupby("prompt_id")["r"].mean()
    )
    assert change.difference == pytest.approx(differences.mean())
    assert change.se == pytest.approx(differences.sem())
    assert change.ci_low < change.difference < change.ci_high
    wider = changes(samples, reference, problem, 0.9, {"r": (-20.0, 20.0)})["r"]
    assert wider.ci_low < change.ci_low and wider.ci_high > change.ci_high
