"""The inequalities of docs/theory.md as numbers: left side, right side, for one family on one
world. Notation of `restricted_families`."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from constrained_dpo.dual.function import evaluate_dual
from constrained_dpo.dual.steps import auto_step_scale, step_size_at
from tests.helpers.restricted_families import (
    Family,
    Point,
    best_iterate,
    dual,
    family_dual,
    gibbs,
    minimize_family_dual,
    objective_and_slack,
    oscillation,
    stacked_utilities,
)

DESCENT_ROUNDS, DESCENT_STEP, DESCENT_SCHEDULE = 6, 0.3, "inverse_sqrt"
TOLERANCE = 1e-9  # of a check, relative to 1 + |right side| + the reward's standard deviation


@dataclass(frozen=True)
class Row:
    """One inequality left ≤ right, in the units that the theorem states it in."""

    check: str
    left: float
    right: float

    def holds(self, reward_std: float) -> bool:
        return self.left <= self.right + TOLERANCE * (1 + abs(self.right) + reward_std)


@dataclass(frozen=True)
class Solved:
    """A family with its λ_p*, the one-shot point at λ*, the dual descent's iterates, and λ*, P*, π*
    of the unrestricted problem."""

    family: Family
    best: Point
    one_shot: Point
    iterates: list[Point]
    star: np.ndarray
    optimal_value: float
    optimal_logp: np.ndarray
    optimal_slack: np.ndarray

    @property
    def best_iterate(self) -> Point:
        return min(self.iterates, key=lambda p: p.dual_value)

    def near_optimal(self) -> dict[str, Point]:
        """The multipliers of C, E and G: λ_p* (γ = 0), one-shot λ*, and the best iterate of
        the descent."""
        return {"multi-shot": self.best, "one-shot": self.one_shot, "descent": self.best_iterate}


def solve(family: Family) -> Solved:
    world = family.world
    star = world.optimum.lambda_.to_numpy()
    logp = gibbs(world, star)
    _, iterates = best_iterate(
        family, np.zeros_like(star), DESCENT_ROUNDS, DESCENT_STEP, DESCENT_SCHEDULE
    )
    return Solved(
        family=family,
        best=minimize_family_dual(family),
        one_shot=family_dual(family, star),
        iterates=iterates,
        star=star,
        optimal_value=world.optimum.dual_value,
        optimal_logp=logp,
        optimal_slack=objective_and_slack(world, logp)[1],
    )


def l1_distance(logp: np.ndarray, other: np.ndarray) -> float:
    """E_x ‖π − π′‖₁."""
    return float(np.abs(np.exp(logp) - np.exp(other)).sum(1).mean())


def curvature(solved: Solved, lam: np.ndarray) -> float:
    """A lower bound a(S)·σ_min(∇²D(λ*)) on [D(λ) − D(λ*) − ∇D(λ*)·d]/‖d‖², d = λ − λ* (C):
    the log-partition function's third derivative along d is at most osc(d·g)/β times its second, so
    the curvature falls no faster than exponentially."""
    world = solved.family.world
    hessian = evaluate_dual(
        world.score_table, solved.star, world.problem.beta, world.levels.to_numpy()
    ).hessian
    change = (
        oscillation(np.tensordot(lam - solved.star, stacked_utilities(world), 1))
        / world.problem.beta
    )
    shrink = 0.5 - change / 6 if change < 1e-4 else (np.expm1(-change) + change) / change**2
    return float(shrink * np.linalg.eigvalsh(hessian)[0])


def inequality_rows(solved: Solved, nu: float | None = None) -> list[Row]:
    """Every inequality of docs/theory.md. nu: a claimed parametrization gap; None: the family's
    own."""
    family, best = solved.family, solved.best
    world, beta, nu = family.world, family.world.problem.beta, family.nu if nu is None else nu
    half_ranges = np.array([oscillation(world.utilities[n]) / 2 for n in world.problem.names])

    def bound(lam: np.ndarray) -> float:
        return family.constant(lam) * nu

    rows = [
        Row("weak duality: D_p* ≤ P*", best.dual_value, solved.optimal_value),
        Row("B: P* − D_p* ≤ C ν", solved.optimal_value - best.dual_value, bound(best.lam)),
        Row(
            "H: D_p(λ_best) − D_p*",
            solved.best_iterate.dual_value - best.dual_value,
            descent_bound(solved),
        ),
    ]
    extra = [np.zeros_like(solved.star), solved.star + 1, solved.star / 3]
    for point in (
        best,
        solved.one_shot,
        solved.best_iterate,
        *(family_dual(family, lam) for lam in extra),
    ):
        gap = dual(world, point.lam) - point.dual_value
        rows += [
            Row("A: 0 ≤ D(λ) − D_p(λ)", -gap, 0.0),
            Row("A: D(λ) − D_p(λ) ≤ C ν", gap, bound(point.lam)),
            Row(
                "D: E‖π_p(λ) − π*_λ‖₁",
                l1_distance(point.logp, gibbs(world, point.lam)),
                np.sqrt(2 * bound(point.lam) / beta),
            ),
        ]
    for point in solved.near_optimal().values():
        c, excess = bound(point.lam), max(point.dual_value - best.dual_value, 0.0)
        distance = np.sqrt(2 * c / beta) + np.sqrt(2 * (c + excess) / beta)
        shift = np.linalg.norm(point.lam - solved.star)
        rows.append(
            Row("C: ‖λ − λ*‖", float(shift), np.sqrt((c + excess) / curvature(solved, point.lam)))
        )
        rows.append(
            Row("D: E‖π_p(λ) − π*‖₁", l1_distance(point.logp, solved.optimal_logp), distance)
        )
        slack_bounds = half_ranges * distance
        rows.append(
            Row(
                "G: |F(π_p(λ)) − P*|",
                abs(point.objective - solved.optimal_value),
                2 * c + excess + float(point.lam @ slack_bounds),
            )
        )
        rows += [
            Row("E: |u(π_p(λ)) − u(π*)|", float(left), float(right))
            for left, right in zip(
                np.abs(point.slack - solved.optimal_slack), slack_bounds, strict=True
            )
        ]
    # What the multi-shot policy itself satisfies wherever D_p is differentiable at λ_p*, as it
    # always is over a convex family.
    rows.append(Row("multi-shot is feasible: −u ≤ 0", float(-best.slack.min()), 0.0))
    rows.append(
        Row("no gap inside the family: |F − D_p*| = 0", abs(best.objective - best.dual_value), 0.0)
    )
    return rows


def descent_bound(solved: Solved) -> float:
    """H: (Σ_i (λ_0 − λ_p*)²_i/h_i + Σ_t η_t² Σ_i h_i u_t,i²) / (2 Σ_t η_t), h the scale of
    each constraint's step."""
    world = solved.family.world
    scale = auto_step_scale(world.score_table, world.problem).to_numpy()
    steps = np.array(
        [step_size_at(DESCENT_STEP, DESCENT_SCHEDULE, t) for t in range(len(solved.iterates))]
    )
    slacks = np.stack([p.slack for p in solved.iterates])
    start = ((solved.iterates[0].lam - solved.best.lam) ** 2 / scale).sum()
    return float((start + (steps[:, None] ** 2 * scale * slacks**2).sum()) / (2 * steps.sum()))


def gaps(solved: Solved) -> dict[str, float]:
    """The quantities whose rates in ν the theorems bound, score units (distances: L1, and reward
    units per utility unit)."""
    return {
        "primal-dual gap P* − D_p*": solved.optimal_value - solved.best.dual_value,
        "objective gap, multi-shot": abs(solved.best.objective - solved.optimal_value),
        "objective gap, one-shot": abs(solved.one_shot.objective - solved.optimal_value),
        "constraint gap, one-shot": float(
            np.abs(solved.one_shot.slack - solved.optimal_slack).max()
        ),
        "multipliers ‖λ_p* − λ*‖": float(np.linalg.norm(solved.best.lam - solved.star)),
        "policies E‖π_p(λ_p*) − π*‖₁": l1_distance(solved.best.logp, solved.optimal_logp),
    }


def slope(nu: np.ndarray, values: np.ndarray, floor: float) -> float:
    """The least-squares slope of log value on log ν over the values above `floor` (rounding error);
    NaN with fewer than four."""
    keep = values > floor
    return (
        float(np.polyfit(np.log(nu[keep]), np.log(values[keep]), 1)[0])
        if keep.sum() >= 4
        else float("nan")
    )


def summarize(rows: list[tuple[Row, float]]) -> pd.DataFrame:
    """By check: how many, how many violated, and how tight: the median and largest left/right where
    the right side is not 0.

    rows: with the standard deviation of their world's reward.
    """
    frame = pd.DataFrame(
        [
            {
                "check": r.check,
                "violated": not r.holds(std),
                "ratio": r.left / r.right if r.right > 0 else np.nan,
                "excess": r.left - r.right,
            }
            for r, std in rows
        ]
    )
    grouped = frame.groupby("check", sort=False)
    return pd.DataFrame(
        {
            "checks": grouped.size(),
            "violated": grouped["violated"].sum(),
            "median ratio": grouped["ratio"].median(),
            "largest ratio": grouped["ratio"].max(),
            "largest excess": grouped["excess"].max(),
        }
    )
