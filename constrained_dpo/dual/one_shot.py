"""The one-shot multipliers: λ* = argmin D(λ) on samples of the reference policy. numpy and scipy
only.

Source of the program: MoCAN, arXiv:2405.19544.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

from constrained_dpo.dual.function import DualPoint, prompt_terms
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem

TOLERANCE = 1e-12  # of the KKT residual, in units of 1 + max |g|


# passes of one Newton search; where the weights are almost one-hot D is nearly piecewise linear
# and Newton gets lost
MAX_NEWTON_PASSES = 40


MAX_STAGES = 60  # of the continuation that takes over there


START_PROMPTS = 1024  # the search starts from the minimizer on so many prompts


Evaluate = Callable[[np.ndarray], DualPoint]


@dataclass(frozen=True)
class OneShotSolution:
    """λ* = argmin_{0 ≤ λ ≤ max_lambda} D(λ), and what the tilted policy π*_λ is predicted to do.

    lambda_: λ* by constraint; dual_value: D(λ*); reward, utilities: E[r], E[g] in score units; kl:
    in nats; kkt_residual: in score units of g. ess, min_ess: mean and smallest effective sample
    size per prompt. passes: over the whole table, line search included, parts of the table counted
    by their share and rounded up. `at_bound` names the constraints whose λ* sits at max_lambda with
    D still falling.
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
    min_ess: float


def solve_one_shot(
    table: ScoreTable,
    problem: ConstrainedProblem,
    levels: pd.Series | None = None,
    max_lambda: float = 1e3,
    start: pd.Series | None = None,
) -> OneShotSolution:
    """Minimizes D over 0 ≤ λ ≤ max_lambda: projected Newton with the exact Hessian, float64; D
    never rises.

    levels: a_i by constraint; None takes them from the table's own reference means. start: λ to
    start from; None starts a large table from the minimizer on its START_PROMPTS evenly spaced
    prompts. Source of the program: MoCAN, arXiv:2405.19544.
    """
    names = problem.names
    if levels is None:
        levels = table.levels(problem)
    # D has the means over all prompts: a utility of a share of them counts with that share
    target = levels.reindex(names).to_numpy(np.float64) * table.shares
    lam, share = np.zeros(len(names)), 0.0
    if start is not None:
        lam = np.clip(start.reindex(names).to_numpy(np.float64), 0.0, max_lambda)
    elif names and len(table.counts) >= 4 * START_PROMPTS:
        sample = table.take(np.linspace(0, len(table.counts) - 1, START_PROMPTS).astype(int))
        first = minimize_dual(sample, problem.beta, target, max_lambda, lam, tolerance=1e-4)
        lam, share = first.lambda_, first.passes * len(sample.reward) / len(table.reward)
    solution = minimize_dual(table, problem.beta, target, max_lambda, lam)
    lam, point = solution.lambda_, solution.point
    return OneShotSolution(
        lambda_=pd.Series(lam, index=names, dtype=float),
        dual_value=point.value,
        reward=point.reward,
        utilities=pd.Series(point.utilities / table.shares, index=names, dtype=float),
        kl=point.kl,
        ess=float(point.ess.mean()),
        kkt_residual=float(np.max(_kkt(lam, point.gradient, max_lambda), initial=0.0)),
        passes=int(np.ceil(solution.passes + share)),
        at_bound=tuple(
            n
            for n, v, g in zip(names, lam, point.gradient, strict=True)
            if v >= max_lambda and g < 0
        ),
        min_ess=float(point.ess.min()),
    )


@dataclass(frozen=True)
class FirstMultipliers:
    """λ_0: the one-shot multipliers corrected for the number of responses, and what they rest on.

    plain: the solution on all responses; responses: per prompt, the smallest number of any prompt
    used; prompts: how many were used; replaced: constraints whose λ is the linear response instead,
    because the samples do not reach their level.
    """

    lambda_: pd.Series
    plain: OneShotSolution
    responses: int
    prompts: int
    replaced: tuple[str, ...]


def first_multipliers(
    table: ScoreTable,
    problem: ConstrainedProblem,
    max_lambda: float = 1e3,
    start: pd.Series | None = None,
) -> FirstMultipliers:
    """Estimate λ* = argmin D from samples of π_ref with few responses per prompt.

    log mean_K exp is biased low by a term of order 1/K, so λ_K is too large by one of that order; 2
    λ_K − λ_{K/2} has none, λ_{K/2} being the mean over both halves of each prompt's responses
    (Richardson's extrapolation; Quenouille 1956). Only prompts with at least half the largest
    number of responses are used: those with few would carry their bias into it. The correction is
    kept within half and twice λ_K. Where the samples do not reach a level, λ there is the linear
    response β Cov(g)⁻¹ (a − ḡ_ref − Cov(g, r)/β) within prompts, at least 0. start: λ to start the
    search from.
    """
    table = richest(table)
    plain = solve_one_shot(table, problem, None, max_lambda, start)
    lambda_ = plain.lambda_
    if problem.names and int(table.counts.min()) >= MIN_HALVED:
        solved = [
            solve_one_shot(half, problem, None, max_lambda, lambda_) for half in halves(table)
        ]
        lambda_ = extrapolated(lambda_, (solved[0].lambda_ + solved[1].lambda_) / 2)
    if plain.at_bound:
        linear = _linear_response(table, problem, max_lambda)
        lambda_ = lambda_.where(~lambda_.index.isin(plain.at_bound), linear)
    return FirstMultipliers(
        lambda_=lambda_.clip(0.0, max_lambda),
        plain=plain,
        responses=int(table.counts.min()),
        prompts=len(table.counts),
        replaced=plain.at_bound,
    )


MIN_HALVED = 4
"""Responses of a prompt from which halves of them are solved too."""


def richest(table: ScoreTable) -> ScoreTable:
    """Keep the prompts with at least half the largest number of responses."""
    rich = np.flatnonzero(2 * table.counts >= table.counts.max())
    return table if len(rich) == len(table.counts) else table.take(rich)


def halves(table: ScoreTable) -> list[ScoreTable]:
    """Split each prompt's responses in two, every other one."""
    place = np.arange(len(table.reward)) - np.repeat(table.starts, table.counts)
    every = np.arange(len(table.counts))
    return [table.take(every, place % 2 == half) for half in (0, 1)]


def extrapolated(whole: pd.Series, half: pd.Series) -> pd.Series:
    """Extrapolate λ_K and the mean λ_{K/2} to 2 λ_K − λ_{K/2}, within half and twice λ_K."""
    return (2 * whole - half).clip(whole / 2, 2 * whole)


def _linear_response(
    table: ScoreTable, problem: ConstrainedProblem, max_lambda: float
) -> pd.Series:
    """λ ≥ 0 at which E[g] would reach its level if it answered linearly, as it does near 0."""
    columns, beta = list(table.utilities.T), problem.beta
    covariance = np.array([[table.within_covariance(a, b) for b in columns] for a in columns])
    with_reward = np.array([table.within_covariance(a, table.reward) for a in columns])
    rise = (table.levels(problem).to_numpy() - table.reference_means()) * table.shares
    # min ‖Cov λ − (β rise − Cov(g, r))‖ over the box
    bounds = (0.0, max_lambda)
    solution = optimize.lsq_linear(covariance, beta * rise - with_reward, bounds=bounds)
    return pd.Series(solution.x, index=problem.names)


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
    return float(np.max(_kkt(lam, point.gradient, max_lambda) / scale, initial=0.0))


def _kkt(lam: np.ndarray, gradient: np.ndarray, max_lambda: float) -> np.ndarray:
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
