"""u from samples against the exact slack of an enumerated world."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.slack import estimate_subgradient
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


@pytest.mark.parametrize("level", [{"margin": 0.4}, {"threshold": 0.1}], ids=str)
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
