"""The one-shot multipliers: λ* = argmin D(λ) on samples of the reference policy. numpy and scipy only.

Source of the program: MoCAN, arXiv:2405.19544, Algorithm 1, step 1.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from constrained_dpo.dual import DualPoint, ScoreTable, evaluate_dual
from constrained_dpo.problem import ConstrainedProblem

MAX_NEWTON_STEPS = 200


@dataclass(frozen=True)
class OneShotSolution:
    """λ* = argmin_{0 ≤ λ ≤ max_lambda} D(λ), the tilted policy's predicted means, and the KKT residual (score units of g).

    `at_bound` names the constraints whose λ* sits at max_lambda with D still falling: on these samples they cannot be met.
    """

    lambda_: pd.Series
    dual_value: float
    reward: float
    utilities: pd.Series
    kl: float
    ess: float
    kkt_residual: float
    passes: int
    at_bound: tuple[str, ...]


def solve_one_shot(
    table: ScoreTable, problem: ConstrainedProblem, levels: pd.Series | None = None, max_lambda: float = 1e3
) -> OneShotSolution:
    """Minimizes D over 0 ≤ λ ≤ max_lambda by projected Newton (Bertsekas 1982: variables held at a bound take no Newton step).

    levels: a_i by constraint; None takes them from the table's own reference means (samples of π_ref). Float64, exact Hessian; the
    line search is on D itself, so D never rises. Source of the program: MoCAN, arXiv:2405.19544, Algorithm 1, step 1.
    """
    names = problem.names
    if levels is None:
        levels = problem.levels(pd.Series(table.reference_means(), index=names))
    target = levels.reindex(names).to_numpy(np.float64)
    lam = np.zeros(len(names))
    point, passes = evaluate_dual(table, lam, problem.beta, target), 1
    scale = 1.0 + np.abs(table.utilities).max(axis=0, initial=0.0)
    while passes < MAX_NEWTON_STEPS and np.max(_kkt(lam, point.gradient, max_lambda) / scale, initial=0.0) > 1e-12:
        direction = _newton_direction(lam, point, max_lambda)
        step, accepted = 1.0, False
        while step > 1e-10 and passes < MAX_NEWTON_STEPS:
            candidate = np.clip(lam + step * direction, 0.0, max_lambda)
            trial = evaluate_dual(table, candidate, problem.beta, target)
            passes += 1
            slope = point.gradient @ (candidate - lam)
            if trial.value <= point.value + 1e-4 * min(slope, 0.0) or (
                # At the rounding level of D its gradient is still exact: accept what shrinks the residual.
                abs(trial.value - point.value) <= 1e-13 * (1 + abs(point.value))
                and _kkt(candidate, trial.gradient, max_lambda).max() < _kkt(lam, point.gradient, max_lambda).max()
            ):
                accepted = True
                break
            step *= 0.5
        if not accepted or np.array_equal(candidate, lam):
            break
        lam, point = candidate, trial
    at_bound = tuple(n for n, v, g in zip(names, lam, point.gradient, strict=True) if v >= max_lambda and g < 0)
    return OneShotSolution(
        lambda_=pd.Series(lam, index=names, dtype=float),
        dual_value=point.value,
        reward=point.reward,
        utilities=pd.Series(point.utilities, index=names, dtype=float),
        kl=point.kl,
        ess=float(point.ess.mean()),
        kkt_residual=float(np.max(_kkt(lam, point.gradient, max_lambda), initial=0.0)),
        passes=passes,
        at_bound=at_bound,
    )


def _kkt(lam: np.ndarray, gradient: np.ndarray, max_lambda: float) -> np.ndarray:
    """Projected gradient: 0 at the constrained minimum. At λ = 0 only a negative gradient counts, at max_lambda only a positive."""
    residual = np.abs(gradient)
    residual[(lam <= 0) & (gradient > 0)] = 0.0
    residual[(lam >= max_lambda) & (gradient < 0)] = 0.0
    return residual


def _newton_direction(lam: np.ndarray, point: DualPoint, max_lambda: float) -> np.ndarray:
    held = ((lam <= 0) & (point.gradient > 0)) | ((lam >= max_lambda) & (point.gradient < 0))
    free = ~held
    direction = np.zeros_like(lam)
    hessian = point.hessian[np.ix_(free, free)]
    # A ridge relative to the curvature keeps ties and identical utilities solvable; it vanishes beside any real curvature.
    ridge = 1e-14 * max(np.trace(hessian), 1e-300) * np.eye(free.sum())
    newton, *_ = np.linalg.lstsq(hessian + ridge, -point.gradient[free], rcond=1e-13)
    if newton @ point.gradient[free] >= 0 or not np.isfinite(newton).all():
        newton = -point.gradient[free]
    # Where curvature is nearly zero the step is unbounded; the box is as far as it can go.
    direction[free] = np.clip(newton, -max_lambda, max_lambda)
    return direction
