"""The one-shot multipliers: λ* = argmin D(λ) on samples of the reference policy. numpy and scipy
only.

Source of the program: MoCAN, arXiv:2405.19544.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

from constrained_dpo.dual.newton import kkt_residuals, minimize_dual
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem

START_PROMPTS = 1024  # the search starts from the minimizer on so many prompts


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
        kkt_residual=float(np.max(kkt_residuals(lam, point.gradient, max_lambda), initial=0.0)),
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
