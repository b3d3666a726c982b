"""The minimum of the dual function D over a box, by Newton's method and, where that gets lost, by
continuation in β. numpy only."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from constrained_dpo.dual.function import DualPoint, prompt_terms
from constrained_dpo.dual.scores import ScoreTable

TOLERANCE = 1e-12  # of the KKT residual, in units of 1 + max |g|


# passes of one Newton search; where the weights are almost one-hot D is nearly piecewise linear
# and Newton gets lost
MAX_NEWTON_PASSES = 40


MAX_STAGES = 60  # of the continuation that takes over there


Evaluate = Callable[[np.ndarray], DualPoint]


@dataclass(frozen=True)
class Minimum:
    """Where a search stopped: λ (m,), D there, the relative KKT residual and the passes it took."""

    lambda_: np.ndarray
    point: DualPoint
    residual: float
    passes: int


def minimize_dual(
    table: ScoreTable,
    beta: float,
    levels: np.ndarray,
    max_lambda: float,
    start: np.ndarray,
    start_point: DualPoint | None = None,
    prompt_weight: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> Minimum:
    """argmin of D over the box by projected Newton and, where that gets lost, by continuation in β.

    levels, start: (m,); start_point: D at `start` if it is known; prompt_weight: (num_prompts,)
    weights of the prompts; tolerance: of the KKT residual relative to 1 + max |g|.
    """
    scale = 1.0 + np.array([max(column.max(), -column.min()) for column in table.utilities.T])

    def search(
        at_beta: float, lam: np.ndarray, to: float, point: DualPoint | None = None
    ) -> Minimum:
        def evaluate(x: np.ndarray) -> DualPoint:
            return prompt_terms(table, x, at_beta).point(levels, prompt_weight)

        return _newton(evaluate, lam, point, scale, max_lambda, to)

    solution = search(beta, start, tolerance, start_point)
    if solution.residual <= max(tolerance, 1e-9):
        return solution
    lam, passes = _continuation(search, beta, start, solution.passes)
    again = search(beta, lam, tolerance)
    best = min(solution, again, key=lambda m: (m.residual > 1e-9, m.point.value, m.residual))
    return Minimum(best.lambda_, best.point, best.residual, passes + again.passes)


def _continuation(
    search: Callable[..., Minimum], beta: float, start: np.ndarray, passes: int
) -> tuple[np.ndarray, int]:
    """λ close to the minimizer, and the passes so far: D is solved at a larger β, where it is
    smooth, and followed down to β."""
    lam, at, rough = start, beta, 1e-5
    for _ in range(MAX_STAGES):
        at *= 8.0
        solution = search(at, start, rough)
        passes += solution.passes
        if solution.residual <= rough:
            lam = solution.lambda_
            break
    factor = 4.0
    for _ in range(MAX_STAGES):
        if at <= beta:
            break
        lower = max(beta, at / factor)
        solution = search(lower, lam, rough)
        passes += solution.passes
        if solution.residual <= rough:
            lam, at, factor = solution.lambda_, lower, min(factor**1.5, 16.0)
        else:
            factor = max(factor**0.5, 1.01)
    return lam, passes


def _newton(
    evaluate: Evaluate,
    lam: np.ndarray,
    point: DualPoint | None,
    scale: np.ndarray,
    max_lambda: float,
    tolerance: float,
) -> Minimum:
    """Projected Newton (Bertsekas 1982: variables held at a bound take no Newton step); each trial
    point costs one pass."""
    passes = 0 if point is not None else 1
    point = point if point is not None else evaluate(lam)
    residual = _residual(lam, point, scale, max_lambda)
    while residual > tolerance and passes < MAX_NEWTON_PASSES:
        direction, step, accepted = _newton_direction(lam, point, scale, max_lambda), 1.0, False
        while step > 1e-10 and passes < MAX_NEWTON_PASSES:
            candidate = np.clip(lam + step * direction, 0.0, max_lambda)
            trial = evaluate(candidate)
            passes += 1
            slope, trial_residual = (
                point.gradient @ (candidate - lam),
                _residual(candidate, trial, scale, max_lambda),
            )
            # At the rounding level of D its gradient is still exact: accept what shrinks the
            # residual.
            level = abs(trial.value - point.value) <= 1e-13 * (1 + abs(point.value))
            accepted = trial.value <= point.value + 1e-4 * min(slope, 0.0) or (
                level and trial_residual < residual
            )
            if accepted:
                break
            step *= _shorter(slope, trial.gradient @ (candidate - lam))
        if not accepted or np.array_equal(candidate, lam):
            break
        lam, point, residual = candidate, trial, trial_residual
    return Minimum(lam, point, residual, passes)


def _shorter(slope: float, trial_slope: float) -> float:
    """The factor of a rejected step: D is convex, so its slope changes sign between the two points;
    the secant's root, kept safe."""
    return (
        float(np.clip(slope / (slope - trial_slope), 0.05, 0.5)) if slope < 0 < trial_slope else 0.5
    )


def _residual(lam: np.ndarray, point: DualPoint, scale: np.ndarray, max_lambda: float) -> float:
    return float(np.max(kkt_residuals(lam, point.gradient, max_lambda) / scale, initial=0.0))


def kkt_residuals(lam: np.ndarray, gradient: np.ndarray, max_lambda: float) -> np.ndarray:
    """Projected gradient: 0 at the constrained minimum. At λ = 0 only a negative gradient counts,
    at max_lambda only a positive."""
    residual = np.abs(gradient)
    residual[(lam <= 0) & (gradient > 0)] = 0.0
    residual[(lam >= max_lambda) & (gradient < 0)] = 0.0
    return np.asarray(residual)


def _newton_direction(
    lam: np.ndarray, point: DualPoint, scale: np.ndarray, max_lambda: float
) -> np.ndarray:
    held = ((lam <= 0) & (point.gradient > 0)) | ((lam >= max_lambda) & (point.gradient < 0))
    free = ~held
    curvature, basis = np.linalg.eigh(point.hessian[np.ix_(free, free)])
    downhill = -(basis.T @ point.gradient[free])
    # Without curvature (ties, identical utilities, one response per prompt) D is linear: as far
    # as the box goes, or nowhere if level.
    steps = np.where(np.abs(downhill) > 1e-13 * scale.max(), np.sign(downhill) * max_lambda, 0.0)
    curved = (curvature > 1e-13 * curvature.max(initial=0.0)) & (
        curvature * max_lambda > np.abs(downhill)
    )
    steps[curved] = downhill[curved] / curvature[curved]
    direction = np.zeros_like(lam)
    direction[free] = basis @ steps
    return direction
