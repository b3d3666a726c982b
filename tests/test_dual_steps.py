"""The Newton step: its parts against independent solvers, its safeguards one by one, its rounds on simulated learners."""

import itertools
import zlib

import numpy as np
import pandas as pd
import pytest
from bench_steps import Simulation
from conftest import random_world
from scipy import optimize

from constrained_dpo.dual import ScoreTable, evaluate_dual
from constrained_dpo.dual_steps import (
    FIRST_STEP,
    GROWTH,
    SKEW,
    Observation,
    Theory,
    _linear_root,
    measured_slope,
    newton_step,
    predict,
)

UNIT = pd.Series({"a": 1.0})


def seen(lambda_: float | list, slack: float | list, spread: float = 0.01, names: str = "a") -> Observation:
    """A round on 100 prompts with these mean slacks; their noise differs between rounds."""
    index, slack = list(names), np.atleast_1d(slack).astype(float)
    noise = np.random.default_rng(zlib.crc32(f"{lambda_}{slack}".encode())).normal(size=(100, len(index)))
    noise -= noise.mean(axis=0)
    return Observation(
        pd.Series(np.atleast_1d(lambda_).astype(float), index), pd.Series(slack, index), pd.DataFrame(slack + spread * noise, columns=index)
    )


def theory(slope: float, target: float | None = None, response: float = 1.0, ceiling: float | None = None) -> Theory:
    top = slope / response if ceiling is None else ceiling
    return Theory(None if target is None else np.array([target]), np.array([[slope]]), np.array([[top]]), response)


def step(history, theory_, eta=0.5, max_lambda=50.0):
    lambda_, kind = newton_step(history, theory_, eta * UNIT, UNIT, max_lambda)
    return lambda_["a"], kind


def test_first_step_is_newtons_on_theorys_slope_or_its_plug_in_target():
    assert step([seen(0.2, -0.4)], theory(2.0)) == (pytest.approx(0.4), "newton")
    assert step([seen(0.2, -0.4)], theory(2.0, target=0.9)) == (pytest.approx(0.9), "plug-in")
    assert step([seen(0.2, 0.9)], theory(2.0)) == (0.0, "newton")  # projected
    assert step([seen(0.2, -0.4)], None) == (pytest.approx(0.4), "subgradient: no usable curvature")


def test_an_unmeasured_step_has_a_trust_region_that_a_small_response_widens():
    assert step([seen(0.0, -0.4)], theory(0.01))[0] == pytest.approx(FIRST_STEP * 0.4)
    assert step([seen(0.0, -0.4)], theory(0.01, response=0.2))[0] == pytest.approx(FIRST_STEP / 0.2 * 0.4)
    assert step([seen(0.0, -0.4)], theory(0.01), max_lambda=1.1)[0] == 1.1


def test_second_step_is_the_secant():
    history = [seen(0.0, -1.0), seen(1.0, -0.6)]
    assert step(history, theory(2.0), eta=0.1) == (pytest.approx(2.5), "secant")
    assert step(history, None, eta=0.1) == (pytest.approx(2.5), "secant")  # also without log-probabilities


def test_a_step_is_at_most_growth_times_the_last_and_at_least_the_subgradients_while_violated():
    flat = [seen(0.0, -1.0, 1e-6), seen(0.01, -1.0 + 1e-5, 1e-6)]
    assert step(flat, theory(2.0), eta=0.1)[0] == pytest.approx(0.01 + GROWTH * 0.01)
    steep = [seen(0.0, -1.0), seen(1.0, -0.1)]
    assert step(steep, theory(2.0), eta=3.0)[0] == pytest.approx(1.3)  # the secant alone would say 1.11
    assert step([seen(0.0, 0.5), seen(1.0, -0.1)], theory(2.0), eta=3.0)[0] < 1.3  # violated for the first time: no floor yet


def test_a_sign_change_brackets_the_root():
    history = [seen(0.8, -1.0), seen(1.0, 0.2), seen(0.95, 1.5)]  # the fit improved: the last secant points away
    value, kind = step(history, theory(0.1, ceiling=10.0), eta=0.1)
    assert value == pytest.approx(0.8 + 0.15 * 1.0 / 2.5) and kind == "bracket"


def test_an_effect_within_noise_only_bounds_the_slope():
    noisy = [seen(0.0, -1.0, 3.0), seen(1.0, -0.99, 3.0)]
    slope, measured = measured_slope(noisy, np.array([[5.0]]), None)
    along = (noisy[1].by_prompt - noisy[0].by_prompt)["a"]
    assert measured and slope[0, 0] == pytest.approx(0.01 + 2 * along.sem())
    slope, measured = measured_slope(noisy, np.array([[0.1]]), None)
    assert not measured and slope[0, 0] == 0.1  # the bound says nothing new


def test_an_effect_above_any_response_is_the_fits_own_progress():
    history = [seen(1.0, -0.5), seen(1.01, 0.2)]
    assert measured_slope(history, np.array([[1.0]]), np.array([[2.0]])) == (np.array([[1.0]]), False)
    slope, measured = measured_slope(history, np.array([[1.0]]), None)
    assert measured and slope[0, 0] == pytest.approx(70.0)


def test_bfgs_recovers_a_quadratic_dual_from_m_steps_and_keeps_the_secant_equation():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    slope = root @ root.T + np.eye(3)
    points = [np.zeros(3)] + [rng.normal(size=3) for _ in range(5)]
    history = [seen(list(p), list(slope @ p - 1), 1e-9, "abc") for p in points]
    found, measured = measured_slope(history, np.eye(3), None)
    moved = points[-1] - points[-2]
    np.testing.assert_allclose(found @ moved, slope @ moved, atol=1e-6)
    assert measured and np.allclose(found, found.T) and np.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize("seed", range(10))
def test_linear_root_solves_the_bounded_quadratic_program(seed):
    """Against enumeration of the active sets."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3))
    slope, v, lam, top = root @ root.T + 0.1 * np.eye(3), rng.normal(size=3), rng.random(3), 1.5
    best, value = None, np.inf
    for pattern in itertools.product((0, 1, 2), repeat=3):
        p = np.array([{0: 0.0, 1: -lam[i], 2: top - lam[i]}[k] for i, k in enumerate(pattern)])
        free = [i for i, k in enumerate(pattern) if k == 0]
        fixed = [i for i in range(3) if i not in free]
        p[free] = np.linalg.solve(slope[np.ix_(free, free)], -v[free] - slope[np.ix_(free, fixed)] @ p[fixed]) if free else p[free]
        inside = np.all(lam + p >= -1e-12) and np.all(lam + p <= top + 1e-12)
        if inside and (new := v @ p + p @ slope @ p / 2) < value:
            best, value = lam + p, new
    np.testing.assert_allclose(_linear_root(lam, v, slope, top), best, atol=1e-8)


def enumerated(world, logp, count=400, seed=0):
    """A large sample of a policy as a ScoreTable."""
    rng = np.random.default_rng(seed)
    which = np.stack([rng.choice(logp.shape[1], count, p=np.exp(row)) for row in logp])
    utilities = np.stack([np.take_along_axis(g, which, 1).ravel() for g in world.utilities.values()], axis=1)
    starts, counts = np.arange(len(logp)) * count, np.full(len(logp), count)
    return ScoreTable(np.take_along_axis(world.reward, which, 1).ravel(), utilities, np.zeros(which.size), starts, counts)


def test_theorys_target_is_where_a_tempered_fit_meets_the_constraint():
    """A learner that delivers a third of every log-ratio: the root of its own exact u(λ) is what is predicted."""
    world, share = random_world(2, 1, prompts=60, responses=60, beta=1.0), 1 / 3
    tempered = type(world)(world.problem, world.ref_logp, world.reward * share, {n: g * share for n, g in world.utilities.items()})
    exact_u = lambda lam: world.evaluate(tempered.maximizer(pd.Series({"g0": lam})))["u"]["g0"]  # noqa: E731
    root = optimize.brentq(exact_u, 0, 50)
    logp = tempered.maximizer(pd.Series({"g0": 0.0}))
    now = Observation(pd.Series({"g0": 0.0}), pd.Series({"g0": exact_u(0.0)}), pd.DataFrame())
    said = predict(now, enumerated(world, logp), enumerated(world, world.ref_logp, seed=1), world.problem, share, 50.0)
    assert said.target[0] == pytest.approx(root, rel=0.05)
    slope = (exact_u(1e-4) - exact_u(0.0)) / 1e-4
    assert said.slope[0, 0] == pytest.approx(slope, rel=0.05)
    assert said.ceiling[0, 0] == pytest.approx(slope / share, rel=0.05)


def test_where_reference_samples_cannot_be_tilted_the_slope_is_the_policys_covariance():
    world = random_world(2, 1, prompts=40, responses=60, beta=0.02)
    logp = world.maximizer(pd.Series({"g0": 0.5}))
    now = Observation(pd.Series({"g0": 0.5}), pd.Series({"g0": -0.2}), pd.DataFrame())
    said = predict(now, enumerated(world, logp), enumerated(world, world.ref_logp, 8), world.problem, 1.0, 50.0)
    weight = np.exp(logp)
    mean = (weight * world.utilities["g0"]).sum(1, keepdims=True)
    exact = (weight * (world.utilities["g0"] - mean) ** 2).sum(1).mean() / 0.02
    assert said.target is None and said.slope[0, 0] == pytest.approx(exact, rel=0.1)


def test_slope_of_the_dual_is_the_change_of_u_per_lambda():
    world = random_world(3, 2, prompts=10)
    lam, table = np.array([0.3, 0.2]), world.score_table
    hessian = evaluate_dual(table, lam, world.problem.beta, world.levels.to_numpy()).hessian
    for i in range(2):
        ahead, behind = lam.copy(), lam.copy()
        ahead[i] += 1e-5
        behind[i] -= 1e-5
        utilities = [evaluate_dual(table, at, world.problem.beta, np.zeros(2)).utilities for at in (ahead, behind)]
        np.testing.assert_allclose(hessian[i], (utilities[0] - utilities[1]) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize(("share", "most"), [(0.03, 4), (0.3, 4), (1.0, 4)])
def test_few_rounds_on_simulated_learners(share, most):
    assert Simulation(7, 1, share, "underfit").rounds("newton", "zeros", 0.5)[0] <= most
    assert Simulation(7, 2, share, "underfit").rounds("newton", "one_shot", 0.5)[0] <= 3


def test_samples_that_all_score_alike_leave_the_subgradient_step():
    assert step([seen(0.2, -0.4)], theory(0.0)) == (pytest.approx(0.4), "subgradient: no usable curvature")


def test_no_constraint_runs_ahead_of_theory_by_much_more_than_all_together():
    """One utility did not answer at all: BFGS alone would send its multiplier up forty-fold."""
    slope = np.eye(2)
    history = [seen([0.0, 0.0], [-0.5, -0.4], 1e-3, "ab"), seen([0.5, 0.4], [-0.2, -0.39], 1e-3, "ab")]
    said = Theory(None, slope, slope, 1.0)
    unit = pd.Series({"a": 1.0, "b": 1.0})
    lambda_, _ = newton_step(history, said, 0.1 * unit, unit, 50.0)
    moved = lambda_.to_numpy() - [0.5, 0.4]
    short = (0.5**2 + 0.4**2) / (0.5 * 0.3 + 0.4 * 0.01)
    assert (moved <= SKEW * short * np.array([0.2, 0.39]) * 1.001).all() and (moved > 0).all()


def test_no_constraints_no_step():
    empty = Observation(pd.Series(dtype=float), pd.Series(dtype=float), pd.DataFrame(index=range(3)))
    lambda_, kind = newton_step([empty], None, pd.Series(dtype=float), pd.Series(dtype=float), 50.0)
    assert lambda_.empty and kind == "no constraints"
