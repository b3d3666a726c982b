"""docs/theory.md on a handful of worlds: every inequality, rates, and that each check can fail."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.bench_theory import primal_by_slsqp, rough_family
from benchmarks.theory_figures import members, plane, random_policies
from tests.helpers.restricted_families import (
    SMALL_WORLD,
    LogLinearFamily,
    MixtureFamily,
    Point,
    family_dual,
    gibbs,
    minimize_family_dual,
    objective_and_slack,
    scaled_world,
    small_worlds,
    with_margin,
)
from tests.helpers.tables import random_world
from tests.helpers.theory_checks import Row, descent_bound, gaps, inequality_rows, slope, solve

SCALES = {"std 1": (1.0, 0.5), "std 10": (10.0, 0.1)}


def solved_families(scale: str, kind: str) -> list:
    std, beta = SCALES[scale]
    pairs = small_worlds(std, beta)
    if kind == "mixture":
        return [solve(MixtureFamily(world, e)) for _, world in pairs for e in (0.01, 0.3)]
    return [
        solve(LogLinearFamily.with_gap(world, nu, seed))
        for (seed, world), nu in zip(pairs, (0.05, 1.2, 0.05, 1.2), strict=True)
    ]


@pytest.mark.parametrize(
    ("scale", "kind"), [("std 1", "mixture"), ("std 10", "mixture"), ("std 1", "log-linear")]
)
def test_every_inequality_holds(scale, kind):
    rows = [row for solved in solved_families(scale, kind) for row in inequality_rows(solved)]
    assert len(rows) > 140
    bad = [row for row in rows if not row.holds(SCALES[scale][0])]
    assert not bad, bad[:5]


def test_every_check_fails_where_nu_is_claimed_too_small():
    """A family of ε = 0.4 that claims a gap 10⁶ times smaller: every bound that depends on ν is
    broken in some world. E's left side is 0 for multi-shot, and one-shot's excess in D_p
    pays for its own; it is broken by a learner that stays at π_ref."""
    failed, seen = set(), set()
    for _, world in small_worlds(*SCALES["std 1"]):
        family = MixtureFamily(world, 0.4)
        solved = solve(family)
        objective, slack = objective_and_slack(world, world.ref_logp)
        lazy = Point(
            solved.star, objective + float(solved.star @ slack), objective, slack, world.ref_logp
        )
        for played in (solved, replace(solved, one_shot=lazy)):
            for row in inequality_rows(played, nu=1e-6 * family.nu):
                if row.check[:2] in ("A:", "B:", "C:", "D:", "E:", "G:") and "0 ≤" not in row.check:
                    seen.add(row.check)
                    failed |= set() if row.holds(1.0) else {row.check}
    assert seen == failed and len(seen) == 7, seen - failed


def test_the_primal_dual_bound_notices_a_gap_claimed_a_tenth_too_small():
    """At std 10 / β 0.1 its constant is nearly attained, so even nine tenths of ν break it."""
    _, world = small_worlds(*SCALES["std 10"])[0]
    family = MixtureFamily(world, 0.01)
    (row,) = (
        r for r in inequality_rows(solve(family), nu=0.9 * family.nu) if r.check.startswith("B:")
    )
    assert not row.holds(10.0)


def test_the_descent_bound_fails_for_a_run_that_does_not_move():
    _, world = small_worlds(*SCALES["std 1"])[0]
    solved = solve(MixtureFamily(world, 0.1))
    gap = solved.best_iterate.dual_value - solved.best.dual_value
    assert 0 <= gap <= descent_bound(solved)
    stuck = replace(solved, iterates=[solved.iterates[0]] * 3000)
    assert stuck.best_iterate.dual_value - solved.best.dual_value > descent_bound(stuck)


def test_the_sides_without_nu_can_fail():
    assert not Row("weak duality", 1.0 + 1e-6, 1.0).holds(1.0)
    _, world = small_worlds(*SCALES["std 1"])[0]
    one_shot = solve(MixtureFamily(world, 0.3)).one_shot
    assert not Row("multi-shot is feasible", float(-one_shot.slack.min()), 0.0).holds(
        1.0
    )  # one-shot's policy is not


@pytest.mark.parametrize("kind", ["mixture", "log-linear"])
def test_rates(kind):
    """Duality gap: slope ≥ 1 − 1e-6 in every world; objective and constraint gaps and distances: ≥
    1/2."""
    for seed, world in small_worlds(*SCALES["std 10" if kind == "mixture" else "std 1"])[::2]:
        if kind == "mixture":
            families = [MixtureFamily(world, e) for e in np.logspace(-3, -0.5, 6)]
        else:
            families = [LogLinearFamily.with_gap(world, nu, seed) for nu in np.logspace(-2, 0, 4)]
        nus = np.array([f.nu for f in families])
        assert nus[-1] / nus[0] >= 99
        table = [gaps(solve(f)) for f in families]
        for name in table[0]:
            rate = slope(nus, np.array([row[name] for row in table]), 1e-11)
            assert rate >= (1 - 1e-6 if name.startswith("duality") else 0.5), (name, rate)
    assert slope(nus, nus**0.4, 0.0) == pytest.approx(0.4)  # a slower rate would be seen


def test_the_lines_support_the_images_and_the_family_lies_inside():
    world = with_margin(scaled_world(0, 1, **SMALL_WORLD), 0.4)
    star = float(world.optimum.lambda_.iloc[0])
    rough = replace(LogLinearFamily.with_gap(world, 1.0, 0), size=1.0)
    for family in (MixtureFamily(world, 0.3), rough):
        best = minimize_family_dual(family)
        every, inside = (
            plane(world, random_policies(world, 300, 0)),
            plane(world, members(family, 300, 1)),
        )
        for cloud in (every, inside):
            assert (cloud[:, 1] + star * cloud[:, 0] <= world.optimum.dual_value + 1e-12).all()
        assert (inside[:, 1] + best.lam[0] * inside[:, 0] <= best.dual_value + 1e-12).all()
        assert best.objective == pytest.approx(
            best.dual_value, abs=1e-11
        )  # the line touches the family's image at the margin
        optimal = objective_and_slack(world, gibbs(world, np.array([star])))
        assert (
            optimal[0] + star * optimal[1][0] > best.dual_value + 0.01
        )  # and the other line lies strictly above it there


def test_one_shot_misses_the_margin_that_multi_shot_meets():
    """Noise on the utility's feature: one-shot falls short in every world; on the reward's: short
    in some, over in others."""
    misses = {"utility": [], "reward": []}
    for seed in range(3):
        world = with_margin(scaled_world(seed, 1, **SMALL_WORLD), 0.5)
        for where, slacks in misses.items():
            family = rough_family(f"noise on the {where}", world, seed)
            assert abs(minimize_family_dual(family).slack[0]) < 1e-9
            slacks.append(family_dual(family, world.optimum.lambda_.to_numpy()).slack[0])
    assert max(misses["utility"]) < -0.01
    assert min(misses["reward"]) < -0.01 and max(misses["reward"]) > 0.01


@pytest.mark.slow
def test_a_family_that_is_not_convex_can_have_a_gap_of_its_own():
    """The one world of 24 in which the bench finds it: at λ_p* two policies are Lagrangian
    maximizers, one short of b and one over it, D_p has a kink, no λ gives b, and the best feasible
    policy lies below D_p*. The theorems' inequalities hold all the same."""
    world = with_margin(scaled_world(16, 1, prompts=8, responses=60), 1.0)
    family = rough_family("noise on the utility", world, 16)
    solved = solve(family)
    best = solved.best
    below, above = (family_dual(family, best.lam * f) for f in (1 - 1e-6, 1 + 1e-6))
    assert below.slack[0] < -0.05 and above.slack[0] > 0.5
    assert below.dual_value == pytest.approx(above.dual_value, abs=1e-5)
    primal = max(primal_by_slsqp(solved, seed) for seed in range(2))
    assert primal < best.dual_value - 0.001
    grid = [
        family.policy(np.array([a, b]))
        for a in np.linspace(0, 1.5, 25)
        for b in np.linspace(1.5, 5, 25)
    ]
    feasible = [f for f, u in (objective_and_slack(world, p) for p in grid) if u[0] >= 0]
    assert max(feasible) <= primal + 1e-9
    assert solved.optimal_value > best.dual_value


def test_the_share_closed_is_of_the_way_from_the_reference_to_the_optimum():
    world = random_world(3, prompts=10, responses=12)
    best = world.exact_optimum
    assert best.share_closed(best.optimal) == pytest.approx(1)
    assert best.share_closed(best.reference) == pytest.approx(0)
    half = np.log((np.exp(world.ref_logp) + np.exp(world.maximizer(world.optimum.lambda_))) / 2)
    policy = world.evaluate(half)
    rise = policy.reward - best.reference.reward - world.problem.beta * policy.kl
    whole = best.objective - best.reference.objective
    assert best.share_closed(policy) == pytest.approx(rise / whole)
