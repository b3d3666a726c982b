"""The solvers of docs/theory.md's families against independent ones."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize

from benchmarks.bench_theory import primal_by_slsqp
from benchmarks.theory_figures import random_policies
from tests.helpers.restricted_families import (
    SMALL_WORLD,
    LogLinearFamily,
    MixtureFamily,
    dual,
    family_dual,
    gibbs,
    minimize_family_dual,
    oscillation,
    scaled_world,
    score,
    small_worlds,
)
from tests.helpers.theory_checks import l1_distance, solve


def by_slsqp(world, epsilon: float, lam: np.ndarray | None) -> float:
    """max of L(·, λ) over Π_ε, or with lam None of F subject to u ≥ 0, by SLSQP on the
    probabilities: knows nothing of floors or duals."""
    prompts, responses = world.reward.shape
    reference, utilities = (
        np.exp(world.ref_logp),
        np.stack([world.utilities[n] for n in world.problem.names]),
    )

    def parts(flat: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        p = flat.reshape(prompts, responses)
        ratio = np.log(p / reference)
        objective = (p * world.reward).sum(1).mean() - world.problem.beta * (p * ratio).sum(
            1
        ).mean()
        slack = (p * utilities).sum(-1).mean(-1) - world.levels.to_numpy()
        return (
            objective,
            slack,
            (world.reward - world.problem.beta * (ratio + 1)) / prompts,
            utilities / prompts,
        )

    weights = np.zeros(len(utilities)) if lam is None else lam
    rows_sum = {
        "type": "eq",
        "fun": lambda f: f.reshape(prompts, responses).sum(1) - 1,
        "jac": lambda f: np.kron(np.eye(prompts), np.ones(responses)),
    }
    feasible = {
        "type": "ineq",
        "fun": lambda f: parts(f)[1],
        "jac": lambda f: parts(f)[3].reshape(len(utilities), -1),
    }
    run = optimize.minimize(
        lambda f: -(parts(f)[0] + weights @ parts(f)[1]),
        reference.ravel(),
        jac=lambda f: -(parts(f)[2] + np.tensordot(weights, parts(f)[3], 1)).ravel(),
        method="SLSQP",
        bounds=[(epsilon * q, 1.0) for q in reference.ravel()],
        constraints=[rows_sum] + ([feasible] if lam is None else []),
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert run.success, run.message
    return -run.fun


@pytest.mark.parametrize("epsilon", [0.02, 0.3])
@pytest.mark.parametrize("num_constraints", [1, 2])
def test_the_mixture_solvers_agree_with_an_independent_one(epsilon, num_constraints):
    world = scaled_world(5, num_constraints, prompts=3, responses=8)
    family = MixtureFamily(world, epsilon)
    for lam in (np.zeros(num_constraints), np.full(num_constraints, 1.3)):
        point = family_dual(family, lam)
        policy = np.exp(point.logp)
        assert (
            policy.sum(1) == pytest.approx(1, abs=1e-13)
            and (policy >= epsilon * np.exp(world.ref_logp) * (1 - 1e-12)).all()
        )
        assert point.dual_value == pytest.approx(by_slsqp(world, epsilon, lam), abs=1e-8)
    best = minimize_family_dual(family)
    assert best.dual_value == pytest.approx(
        by_slsqp(world, epsilon, None), abs=1e-8
    )  # P_p* = D_p*: the family is convex


def test_the_mixture_maximizer_meets_its_stationarity_condition():
    """(1 − ε)[s − β(log m/π_ref + 1)] is one number on the responses above the floor, and no larger
    on those at it."""
    world = scaled_world(6, 1, 10.0, 0.1)
    family, lam = MixtureFamily(world, 0.05), np.array([0.7])
    logp = family.maximizer(lam)
    marginal = score(world, lam) - world.problem.beta * (logp - world.ref_logp + 1)
    free = logp > world.ref_logp + np.log(0.05) + 1e-9
    assert free.any() and not free.all()
    for row, above in zip(marginal, free, strict=True):
        assert np.ptp(row[above]) < 1e-11
        assert (row[~above] <= row[above].max() + 1e-11).all()


def test_the_log_linear_maximizer_agrees_with_nelder_mead_and_many_starts():
    for seed, world in small_worlds(1.0, 0.5):
        family = replace(
            LogLinearFamily.with_gap(world, 1.0, seed), size=1.0
        )  # far from the scores: L is not nearly concave in θ
        lam = np.full(len(world.problem.names), 0.8)
        theta = family.best_theta(lam)
        value = family.loss(theta, lam)
        rng = np.random.default_rng(seed)
        starts = theta + 3 * rng.normal(size=(3, len(theta)))
        runs = [
            optimize.minimize(
                family.loss,
                s,
                (lam,),
                method="Nelder-Mead",
                options={"xatol": 1e-9, "fatol": 1e-13},
            )
            for s in starts
        ]
        assert min(run.fun for run in runs) == pytest.approx(value, abs=1e-9)
        point = family_dual(family, lam)
        assert dual(world, lam) - point.dual_value == pytest.approx(
            value, abs=1e-11
        )  # D(λ) − L(π, λ) = β E_x KL(π‖π*_λ)


def test_nu_is_what_it_says():
    rng = np.random.default_rng(0)
    world = scaled_world(7, 1, **SMALL_WORLD)
    mixture = MixtureFamily(world, 0.2)
    reference = np.exp(world.ref_logp)
    # A policy's L1 distance to {p ≥ ε π_ref} is twice the mass it lacks there.
    policies = [np.exp(p) for p in random_policies(world, 50, 1)]
    rarest = np.eye(reference.shape[1])[reference.argmin(axis=1)]
    far = [2 * np.clip(0.2 * reference - p, 0, None).sum(1).max() for p in [*policies, rarest]]
    assert max(far) == pytest.approx(mixture.nu, rel=1e-12) and max(far[:-1]) < mixture.nu
    for nu in (0.01, 1.0):
        family = LogLinearFamily.with_gap(world, nu, 7)
        assert family.nu == pytest.approx(nu, rel=1e-12)
        distances = []
        for lam in rng.uniform(0, 6, size=(20, 1)):
            distance = np.abs(
                np.exp(family.policy(np.array([1.0, *lam]) / world.problem.beta))
                - np.exp(gibbs(world, lam))
            )
            distances.append(distance.sum(1).max())
        assert 0.05 * nu < max(distances) <= nu


def test_the_log_linear_primal_has_the_value_of_its_dual():
    """SLSQP on θ, which knows no multipliers, finds D_p* from below: no duality gap inside the
    family on these worlds."""
    for seed, world in small_worlds(1.0, 0.5):
        solved = solve(LogLinearFamily.with_gap(world, 1.0, seed))
        primal = primal_by_slsqp(solved, seed)
        assert primal == pytest.approx(solved.best.dual_value, abs=1e-7)
        assert (
            oscillation(solved.best.logp) > 1
            and l1_distance(solved.best.logp, solved.optimal_logp) > 1e-3
        )  # neither is trivial
