"""How λ moves from round to round: the projected subgradient step and the safeguarded Newton step. numpy and scipy only.

Both act on v, the slack that is steered on: u, or its lower confidence bound. v > 0 is satisfied with room, so λ falls.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import lsq_linear

from constrained_dpo.dual import ScoreTable, evaluate_dual
from constrained_dpo.one_shot import solve_one_shot
from constrained_dpo.problem import ConstrainedProblem
from data_prep.settings import UserError

FIRST_STEP = 4.0
"""A step whose response is not measured yet moves λ at most so many scaled subgradient steps of size 1, divided by the response factor."""
GROWTH = 40.0
"""A measured step is at most so many times the last one: in MoCAN's published numbers theory over-states the response 30 times."""
SKEW = 1.5
"""How much more than all constraints together a single one may be held to lag behind theory."""
REMEMBERED = 4
"""Rounds that a bracket is made of: the fit goes on improving, so what λ did long ago says little about what it does now."""
MIN_RESPONSE = 0.01
"""Smallest response factor that is believed."""
MIN_ESS = 4.0
"""Mean effective sample size per prompt below which tilted samples are not believed."""


@dataclass(frozen=True)
class Observation:
    """One round: λ and the slack v that is steered on, by constraint; by_prompt: the slack on every dual prompt, (num_prompts, m) with the
    same index in every round (score units)."""

    lambda_: pd.Series
    slack: pd.Series
    by_prompt: pd.DataFrame


@dataclass(frozen=True)
class Theory:
    """What theory says of a round before any step of λ was measured.

    target: where complementary slackness is expected, (m,), or None where samples cannot say; slope: ∂E[g]/∂λ, (m, m), in utility units
    per λ; ceiling: that of a fit that reaches the maximizer, E_x Cov_{π_θ}(g|x)/β; response: the share of theory's log-ratio that the fit
    delivered (`certificate.response_factor`).
    """

    target: np.ndarray | None
    slope: np.ndarray
    ceiling: np.ndarray
    response: float


def predict(
    now: Observation, samples: ScoreTable, reference: ScoreTable, problem: ConstrainedProblem, response: float, max_lambda: float
) -> Theory:
    """The response to λ of a fit that delivers the share `response` of every log-ratio: that of the maximizer at β/response.

    samples: π_θ's on the dual prompts; reference: π_ref's. Slope: the plug-in dual's Hessian on π_ref's samples at β/response, and where
    their tilted effective sample size is below MIN_ESS, response/β · E_x Cov_{π_θ}(g|x), unbiased. Target: the minimizer of that plug-in
    dual (MoCAN, arXiv:2405.19544), its levels shifted so that it agrees with the slack measured at the current λ.
    """
    response = float(np.clip(response, MIN_RESPONSE, 1.0))
    beta, lam = problem.beta / response, now.lambda_.reindex(problem.names).to_numpy(float)
    zero = np.zeros(len(lam))
    here = evaluate_dual(reference, lam, beta, zero)
    covariance = evaluate_dual(replace(samples, reward=np.zeros_like(samples.reward)), zero, beta, zero).hessian
    covariance *= np.sum(samples.counts / np.maximum(samples.counts - 1, 1)) / len(samples.counts)
    if here.ess.mean() < MIN_ESS:
        return Theory(None, covariance, covariance / response, response)
    levels = pd.Series(here.utilities, index=problem.names) - now.slack.reindex(problem.names)
    solution = solve_one_shot(reference, replace(problem, beta=beta), levels, max_lambda)
    believed = solution.ess >= MIN_ESS and not solution.at_bound
    return Theory(solution.lambda_.to_numpy(float) if believed else None, here.hessian, covariance / response, response)


def auto_step_scale(table: ScoreTable, problem: ConstrainedProblem) -> pd.Series:
    """std(r)/var(g) on reference samples, by constraint: the unit (reward units per utility unit²) of a step that means the same for
    every scorer. Raises UserError where a utility is constant."""
    variance = table.utilities.var(axis=0)
    for name, value in zip(problem.names, variance, strict=True):
        if value <= 0:
            raise UserError(f"utility {name} is constant on the reference samples, so no step moves it; check its scorer")
    return pd.Series(table.reward.std() / variance, index=problem.names, dtype=float)


def step_size_at(step_size: float, schedule: str, round_number: int) -> float:
    """η_t: constant, or step_size/√(t+1) (the step of CAID's convergence theorem)."""
    return step_size / np.sqrt(round_number + 1) if schedule == "inverse_sqrt" else step_size


def dual_step(lambda_: pd.Series, u: pd.Series, step: pd.Series | float, max_lambda: float) -> pd.Series:
    """Projected subgradient step λ ← clip(λ − η u, 0, max_lambda), by constraint (CAID, arXiv:2505.19387, Algorithm 1)."""
    return (lambda_ - step * u.reindex(lambda_.index)).clip(0.0, max_lambda)


def newton_step(
    history: list[Observation], theory: Theory | None, step: pd.Series, unit: pd.Series, max_lambda: float
) -> tuple[pd.Series, str]:
    """λ for the next round and, in a word, how it was found: a projected Newton step on the dual function that the fit really has.

    history: the rounds so far, the current one last. theory: `predict` for the current round, or None where it is unusable. step: η of
    the subgradient step in λ per unit of slack; unit: std(r)/var(g) alone; both by constraint. The first step is theory's; from the
    second round on the slope is what the last steps of λ did to v (`measured_slope`). Safeguards: an unmeasured step is at most
    FIRST_STEP/response units, a measured one GROWTH times the last and for no constraint SKEW times further ahead of theory than for
    all together; for m = 1 a change of sign brackets the root; where a constraint stays violated for a second round its multiplier rises
    at least by the subgradient step; without any usable slope the step is the subgradient's.
    """
    now, names = history[-1], list(history[-1].lambda_.index)
    subgradient = dual_step(now.lambda_, now.slack, step, max_lambda)
    if not names:
        return subgradient, "no constraints"
    lam, v, units = (series.reindex(names).to_numpy(float) for series in (now.lambda_, now.slack, unit))
    if theory is not None and not np.trace(theory.slope) > 0:
        theory = None  # every prompt's samples score alike
    known = (np.diag(1 / units), None) if theory is None else (theory.slope, theory.ceiling)
    slope, measured = measured_slope(history, *known)
    if theory is None and not measured:
        return subgradient, "subgradient: no usable curvature"
    if measured:
        target, kind = _linear_root(lam, v, slope, max_lambda), "secant"
        last = lam - history[-2].lambda_.reindex(names).to_numpy(float)
        radius = np.where(last != 0, GROWTH * np.abs(last), np.inf)
        if theory is not None and (expected := last @ theory.slope @ last) > 0:
            # No constraint's step may exceed theory's by much more than all of them together were seen to fall short of it.
            short = max(expected / (last @ slope @ last), 1.0)
            radius = np.minimum(radius, SKEW * short * np.abs(_linear_root(lam, v, theory.slope, max_lambda) - lam))
    else:
        target, kind = (_linear_root(lam, v, slope, max_lambda), "newton") if theory.target is None else (theory.target, "plug-in")
        radius = FIRST_STEP / theory.response * units * np.abs(v)
    target = np.clip(target, lam - radius, lam + radius)
    before = history[-2].slack.reindex(names).to_numpy(float) if len(history) > 1 else np.zeros(len(names))
    stays_violated = (v < 0) & (before < 0)
    target = np.clip(np.where(stays_violated, np.maximum(target, subgradient.to_numpy(float)), target), 0.0, max_lambda)
    if len(names) == 1 and (bracket := _bracket(history)) is not None and not bracket[0] <= target[0] <= bracket[1]:
        target[0], kind = _interpolate(bracket), "bracket"
    return pd.Series(target, index=names), kind


def measured_slope(history: list[Observation], start: np.ndarray, ceiling: np.ndarray | None) -> tuple[np.ndarray, bool]:
    """∂v/∂λ, shape (m, m), and whether a step of λ measured it; start: the slope before any measurement.

    BFGS over the last m + 2 steps, symmetric because the slope is the Hessian of a dual function (Nocedal & Wright, Numerical Optimization,
    §6.1, with their initial scaling); for m = 1 the secant. A step whose effect is within two standard errors of 0 only bounds the slope
    from above, and one whose effect is beyond them larger than `ceiling` allows says nothing: it was the fit that moved.
    """
    slope, measured = start.copy(), False
    for before, after in list(itertools.pairwise(history))[-(len(start) + 2) :]:
        names = after.lambda_.index
        moved = (after.lambda_ - before.lambda_).to_numpy(float)
        change = (after.by_prompt - before.by_prompt)[names].to_numpy(float)
        along = change @ moved  # the same prompts in both rounds: what they differ in cancels
        noise, change = along.std(ddof=1) / np.sqrt(len(along)), change.mean(axis=0)
        seen, expected = moved @ change, moved @ slope @ moved
        if ceiling is not None and seen - 2 * noise > moved @ ceiling @ moved:
            continue
        if seen > 2 * noise:
            slope *= 1.0 if measured else seen / expected
            pushed = slope @ moved
            slope += np.outer(change, change) / seen - np.outer(pushed, pushed) / (moved @ pushed)
            measured = True
        elif 0 < seen + 2 * noise < expected:
            slope *= (seen + 2 * noise) / expected
            measured = True
    return slope, measured


def _linear_root(lam: np.ndarray, v: np.ndarray, slope: np.ndarray, max_lambda: float) -> np.ndarray:
    """argmin of v·p + ½ p'Sp over 0 ≤ λ + p ≤ max_lambda, as a bounded least-squares problem: exact for any m."""
    values, vectors = np.linalg.eigh(slope)
    values = np.maximum(values, 1e-8 * values.max())
    root, right = (vectors * np.sqrt(values)).T, -(vectors / np.sqrt(values)).T @ v
    return lam + lsq_linear(root, right, (-lam, max_lambda - lam), method="bvls").x


def _bracket(history: list[Observation]) -> tuple[float, float, float, float] | None:
    """(λ_low, λ_high, v_low < 0, v_high ≥ 0) of the last rounds, or None without a change of sign or where they contradict each other."""
    points = [(o.lambda_.iloc[0], o.slack.iloc[0]) for o in history[-REMEMBERED:]]
    below, above = [p for p in points if p[1] < 0], [p for p in points if p[1] >= 0]
    if not below or not above:
        return None
    (low, v_low), (high, v_high) = max(below), min(above)
    return (low, high, v_low, v_high) if low < high else None


def _interpolate(bracket: tuple[float, float, float, float]) -> float:
    """Where the line through both ends of the bracket crosses 0."""
    low, high, v_low, v_high = bracket
    return low + (high - low) * (-v_low) / (v_high - v_low)
