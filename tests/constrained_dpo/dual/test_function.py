"""The dual against independent oracles: scipy's optimizers, finite differences, exact sums, and its
own symmetries."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.dual.function import evaluate_dual
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.steps import auto_step_scale, dual_step, step_size_at
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.tables import random_world, scored_frame


def oracle_dual(world, lam):
    """D(λ) written independently: exact sums with scipy's logsumexp."""
    score = world.reward + sum(
        v * world.utilities[n] for v, n in zip(lam, world.problem.names, strict=True)
    )
    log_z = special.logsumexp(world.ref_logp + score / world.problem.beta, axis=1)
    means = [
        (np.exp(world.ref_logp) * world.utilities[n]).sum(1).mean() for n in world.problem.names
    ]
    levels = np.array(means) + world.problem.bounds.to_numpy()
    return world.problem.beta * log_z.mean() - np.dot(lam, levels)


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_one_shot_equals_scipy_on_enumerated_worlds(m, seed):
    world = random_world(seed, m, margin=0.3)
    solution = world.optimum
    oracle = optimize.minimize(
        lambda lam: oracle_dual(world, lam),
        np.ones(m),
        bounds=[(0, 1e3)] * m,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-11},
    )
    assert solution.dual_value <= oracle.fun + 1e-10
    np.testing.assert_allclose(solution.lambda_, oracle.x, atol=2e-5)
    scale = max(np.abs(g).max() for g in world.utilities.values())
    assert solution.kkt_residual <= 1e-8 * scale


@pytest.mark.parametrize("seed", range(3))
def test_gradient_and_hessian_equal_finite_differences(seed):
    world = random_world(seed, 3)
    lam, levels = np.array([0.3, 0.7, 0.1]), world.levels.to_numpy()
    at = lambda x: evaluate_dual(world.score_table, x, world.problem.beta, levels)
    point, eps = at(lam), 1e-5
    assert point.value == pytest.approx(oracle_dual(world, lam), abs=1e-12)
    for i, step in enumerate(np.eye(3) * eps):
        up, down = at(lam + step), at(lam - step)
        assert (up.value - down.value) / (2 * eps) == pytest.approx(point.gradient[i], abs=1e-7)
        np.testing.assert_allclose(
            (up.gradient - down.gradient) / (2 * eps), point.hessian[i], atol=1e-6
        )


def test_strong_duality_the_maximizer_at_lambda_star_attains_the_dual_value():
    world = random_world(5, 2)
    solution = world.optimum
    value = world.evaluate(world.maximizer(solution.lambda_))
    assert value.objective == pytest.approx(solution.dual_value, abs=1e-7)
    assert all(u >= -1e-7 for u in value.u.values())
    assert solution.reward == pytest.approx(value.reward)
    assert solution.kl == pytest.approx(value.kl)


def test_slack_constraint_has_zero_multiplier():
    world = random_world(1, 2)
    problem = ConstrainedProblem(
        "r", world.problem.beta, (Constraint("g0", margin=0.3), Constraint("g1", threshold=-50.0))
    )
    slack = type(world)(problem, world.ref_logp, world.reward, world.utilities)
    assert slack.optimum.lambda_["g1"] == 0.0
    assert slack.optimum.lambda_["g0"] > 0
    assert slack.evaluate(slack.maximizer(slack.optimum.lambda_)).u["g1"] > 0


def test_permuting_the_constraints_permutes_the_result():
    world = random_world(2, 3)
    reordered = ConstrainedProblem(
        "r", world.problem.beta, tuple(reversed(world.problem.constraints))
    )
    other = type(world)(reordered, world.ref_logp, world.reward, world.utilities)
    pd.testing.assert_series_equal(
        other.optimum.lambda_.sort_index(), world.optimum.lambda_.sort_index(), atol=1e-9
    )


def test_scores_of_a_thousand_ties_and_identical_utilities_are_solved():
    frame = scored_frame(0, 20, 16).assign(g2=lambda f: f["g"])
    frame["r"] = (frame["r"] * 1000).round(-2)
    problem = ConstrainedProblem(
        "r", 1.0, (Constraint("g", margin=0.3), Constraint("g2", margin=0.3))
    )
    table = ScoreTable.from_frame(frame, problem)
    solution = solve_one_shot(table, problem, max_lambda=1e5)
    assert solution.kkt_residual <= 1e-8 * np.abs(table.utilities).max()


def test_an_unreachable_margin_is_named_at_the_bound():
    frame = scored_frame(0, 20, 8)
    problem = ConstrainedProblem("r", 0.1, (Constraint("g", margin=50.0),))
    solution = solve_one_shot(ScoreTable.from_frame(frame, problem), problem, max_lambda=30.0)
    assert solution.at_bound == ("g",) and solution.lambda_["g"] == 30.0


def test_ragged_and_weighted_tables_estimate_the_same_dual():
    """Samples of another sampler q with weights log π_ref − log q give D of π_ref; dropping rows
    keeps it an estimate."""
    world = random_world(3, 1, prompts=8, responses=60)
    rng = np.random.default_rng(0)
    log_q = np.log(rng.dirichlet(np.ones(60) * 5, size=8))
    rows = []
    for x in range(8):
        for y in rng.choice(60, 40_000 + 1000 * x, p=np.exp(log_q[x])):
            rows.append(
                (
                    f"p{x}",
                    world.reward[x, y],
                    world.utilities["g0"][x, y],
                    world.ref_logp[x, y] - log_q[x, y],
                )
            )
    frame = pd.DataFrame(rows, columns=["prompt_id", "r", "g0", "weight"])
    table = ScoreTable.from_frame(
        frame.sample(frac=1, random_state=0), world.problem, log_weight="weight"
    )
    value = evaluate_dual(table, np.array([0.5]), world.problem.beta, world.levels.to_numpy()).value
    assert value == pytest.approx(oracle_dual(world, [0.5]), abs=0.02)


def test_dual_step_signs_projection_and_schedules():
    lam, u = pd.Series({"a": 0.5, "b": 0.1, "c": 49.0}), pd.Series({"c": -9.0, "a": 0.2, "b": 0.9})
    step = dual_step(lam, u, 0.5, 50.0)
    assert step.to_dict() == pytest.approx({"a": 0.4, "b": 0.0, "c": 50.0})
    assert step_size_at(0.6, "constant", 8) == 0.6
    assert step_size_at(0.6, "inverse_sqrt", 8) == pytest.approx(0.2)


def test_projected_subgradient_with_the_exact_maximizer_converges_to_lambda_star():
    world = random_world(11, 2)
    lam = pd.Series(0.0, index=world.problem.names)
    scale = auto_step_scale(world.score_table, world.problem)
    for t in range(400):
        u = pd.Series(world.evaluate(world.maximizer(lam)).u)
        lam = dual_step(lam, u, step_size_at(0.5, "inverse_sqrt", t) * scale, 50.0)
    pd.testing.assert_series_equal(lam, world.optimum.lambda_, atol=1e-4)


def test_what_differs_between_prompts_does_not_change_the_step():
    """30 worlds whose prompts differ in reward by a std of 3, three times that within a prompt:
    |u| falls under 5 % of b in a few rounds in each of them. (In units of the total spread, with
    the same step size of 0.5, u changes its sign in 19 of 19 rounds and none arrives.)"""
    arrived = []
    for seed in range(30):
        plain = random_world(seed, 1, prompts=40, responses=60)
        shift = 3 * np.random.default_rng(seed + 100).normal(size=(40, 1))
        world = TabularWorld(plain.problem, plain.ref_logp, plain.reward + shift, plain.utilities)
        scale = auto_step_scale(world.score_table, world.problem)
        assert scale["g0"] == pytest.approx(auto_step_scale(plain.score_table, plain.problem)["g0"])
        lam, slacks = pd.Series({"g0": 0.0}), []
        for _ in range(20):
            u = world.evaluate(world.maximizer(lam)).u
            slacks.append(abs(u["g0"]))
            lam = dual_step(lam, pd.Series(u), 0.5 * scale, 50.0)
        close = np.flatnonzero(np.array(slacks) < 0.05 * 0.4)
        arrived.append(close[0] if len(close) else 99)
    assert np.median(arrived) <= 4 and max(arrived) < 20
