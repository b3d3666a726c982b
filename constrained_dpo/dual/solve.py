"""The dual of a conditional policy, solved by sampling: the λ (and κ) to try next, from the trials.

The family is π(y|x; λ, κ) ∝ π_ref exp(κ(r + λ·g)/β), so λ is the price of utility in units of
reward whatever κ is; the multiplier of g in the exponent is κλ/β, and the policy is the maximizer
of the Lagrangian at λ and KL weight β/κ. numpy, pandas and scipy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

from constrained_dpo.dual.response import Response
from constrained_dpo.dual.solution import Solution, SolveRule
from constrained_dpo.dual.trial import Trial
from constrained_dpo.problem import by_name

SETTLED = 0.6  # share of the tolerance that the prediction's standard error may have


LIMIT = 3.0  # by what factor a λ may leave the range that was tried


KL_TOLERANCE = 0.02  # of the budget


SURE = 3.0  # standard errors of one trial's v, from which its sign is taken as known


LEAST_ANSWER = 0.1  # a trial is near by what such a share of the maximizer's change comes to


STALLED = 0.5  # share of v that a step leaves when λ hardly moves it


WITHIN = (0.25, 0.75)  # of a bracket


MAX_STEPS, MAX_SWEEPS = 60, 300  # of Newton's method, of coordinate descent within a step


def next_point(trials: Sequence[Trial], rule: SolveRule, start: pd.Series) -> Solution:
    """Find the λ (and κ) at which v_i = 0 where λ_i > 0 and v_i ≥ 0 where λ_i = 0, as far as these
    trials tell.

    A function of its arguments alone, so that a killed run goes on at the same point. start: λ of
    the first trial, by constraint. Done: the prediction rests on a trial nearby and is sure enough;
    or the root lies beyond an end of the box that was tried; or no trial is left. Source of the
    slopes: Newton's method on D, whose Hessian is κ Cov(g)/β. Raises ValueError where a trial lacks
    the KL that a budget needs.
    """
    search = _Search.of(rule, start)
    if not trials:
        return search.first()
    response = Response.of(trials, search.names, with_kl=rule.kl_budget is not None)
    left = len(trials) < rule.trials
    point = search.root(response)
    if left:
        point = search.safeguarded(response, point)
    return search.solution(response, point, left)


@dataclass(frozen=True)
class _Search:
    """The rule as arrays, by constraint: low, high, tolerance, start, (m,); kappa: its range, the
    same twice where it is not solved for. A point is λ, then κ, (m + 1,)."""

    names: list[str]
    low: np.ndarray
    high: np.ndarray
    tolerance: np.ndarray
    start: np.ndarray
    kappa: tuple[float, float]
    budget: float | None

    @classmethod
    def of(cls, rule: SolveRule, start: pd.Series) -> "_Search":
        names = [str(name) for name in start.index]
        low, high, tolerance = (
            series.reindex(names).to_numpy(np.float64)
            for series in (rule.low, rule.high, rule.tolerance)
        )
        kappa = rule.kappa or (1.0, 1.0)
        if rule.kl_budget is None:
            nearest = float(np.clip(1.0, *kappa))
            kappa = nearest, nearest
        first = np.clip(start.to_numpy(np.float64), low, high)
        return cls(names, low, high, np.maximum(tolerance, 1e-12), first, kappa, rule.kl_budget)

    @property
    def one_unknown(self) -> bool:
        """One λ alone is solved for, so that signs of v bracket it."""
        return len(self.names) == 1 and self.kappa[0] == self.kappa[1]

    def first(self) -> Solution:
        unknown = dict.fromkeys(self.names, np.nan)
        return Solution(
            lambda_=pd.Series(self.start, index=self.names),
            kappa=float(np.clip(1.0, *self.kappa)),
            done=False,
            reason="the first trial",
            predicted=unknown,
            predicted_se=unknown,
            responds=dict.fromkeys(self.names, True),
            at_edge=dict.fromkeys(self.names, ""),
        )

    def root(self, response: Response) -> np.ndarray:
        """The point: complementarity at each κ, and the κ at which that meets the budget."""
        box, budget = self.reachable(response), self.budget
        if budget is None:
            return self.complementary(response, self.kappa[0], box)

        def excess(kappa: float) -> float:
            point = self.complementary(response, kappa, box)
            return float(response.at(point).value[-1]) - budget

        low, high = self.kappa
        if excess(low) >= 0:
            return self.complementary(response, low, box)
        if excess(high) <= 0:
            return self.complementary(response, high, box)
        kappa = float(optimize.brentq(excess, low, high, xtol=1e-4))
        return self.complementary(response, kappa, box)

    def reachable(self, response: Response) -> tuple[np.ndarray, np.ndarray]:
        """Ends of λ for now: within LIMIT of what was tried and, for one λ alone, inside the
        bracket of trials whose v is surely below and surely above 0; each (m,)."""
        tried, floor = response.points[:, :-1], self.high / 10
        low = tried.min(axis=0) / LIMIT
        low = np.clip(np.where(low < floor, 0.0, low), self.low, self.high)
        high = np.clip(LIMIT * np.maximum(tried.max(axis=0), floor), self.low, self.high)
        if self.one_unknown and (ends := self.bracket(response)) is not None:
            (below, _), (above, _) = ends
            low, high = np.maximum(low, below), np.minimum(high, above)
        return low, high

    def bracket(self, response: Response) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """The nearest trials, (λ, v), whose v is surely below and surely above 0, for one λ alone;
        None while one side lacks, or where the noise has crossed them."""
        at, v, sure = response.points[:, 0], response.values[:, 0], SURE * response.se[:, 0]
        below = [(x, y) for x, y, s in zip(at, v, sure, strict=True) if y < -s]
        above = [(x, y) for x, y, s in zip(at, v, sure, strict=True) if y > s]
        if not below or not above or max(below)[0] >= min(above)[0]:
            return None
        return max(below), min(above)

    def complementary(
        self, response: Response, kappa: float, box: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """The point at κ where the predicted v meets complementarity within the box: Newton's steps
        on a prediction that is made anew at every point.

        J Δ = −v/ρ has the complementarity of ρ J Δ = −v, and J is symmetric once each row counts
        with the share of prompts that its constraint concerns.
        """
        m, share, last = len(self.names), 1.0, np.zeros(len(self.names))
        weight = response.concerned
        point = np.append(np.clip(response.points[-1, :-1], *box), kappa)
        best, least = point, np.inf
        for _ in range(MAX_STEPS):
            local = response.at(point)
            step = _box_step(
                weight[:, None] * local.slope[:m, :m],
                weight * local.value[:m] / local.ratio[:m],
                box[0] - point[:-1],
                box[1] - point[:-1],
            )
            size = float(np.max(np.abs(local.slope[:m, :m] @ step) / self.tolerance, initial=0.0))
            if size < least:
                best, least = point, size
            if size < 1e-4:
                break
            share = share / 2 if step @ last < 0 else min(1.0, 1.5 * share)
            point, last = np.append(point[:-1] + share * step, kappa), step
        return best

    def safeguarded(self, response: Response, point: np.ndarray) -> np.ndarray:
        """Leave the prediction, for one λ, where the last step left more than half of v: a family
        that is far from its maximizers answers λ otherwise than they would.

        Within a bracket: the secant between its ends, at most three quarters of the way to either.
        Without one: halfway to an end of the box and, from the fourth trial on, to the end itself.
        """
        values, at, trials = response.values, response.points[:, 0], len(response.points)
        if not self.one_unknown or trials < 2:
            return point
        v, sign = values[:, 0], np.sign(values[-1, 0])
        sure = abs(v[-1]) > SURE * response.se[-1, 0]
        if not sure or abs(v[-1]) < STALLED * abs(v[-2]):
            return point
        if (ends := self.bracket(response)) is not None:
            (below, under), (above, over) = ends
            share = np.clip(under / (under - over), *WITHIN)
            inside = below + share * (above - below)
            if below > 0:
                inside = below * (above / below) ** share
            return np.array([inside, point[1]])
        if not (sign * v > SURE * response.se[:, 0]).all():
            return point
        end, seen = (self.high[0], at.max()) if sign < 0 else (self.low[0], at.min())
        half = np.sqrt(end * seen) if end > 0 and seen > 0 else (end + seen) / 2
        goal = half if trials < 3 else end
        return np.array([max(goal, point[0]) if sign < 0 else min(goal, point[0]), point[1]])

    def solution(self, response: Response, point: np.ndarray, left: bool) -> Solution:
        """Judge the point: is another trial needed?"""
        m, lam, local = len(self.names), point[:-1], response.at(point)
        tolerance, ends, goal = self.tolerance, (self.low, self.high), np.zeros(m)
        if self.budget is not None:
            tolerance = np.append(tolerance, KL_TOLERANCE * self.budget)
            ends = np.append(self.low, self.kappa[0]), np.append(self.high, self.kappa[1])
            goal = np.append(goal, self.budget)
        at = point if self.budget is not None else lam
        # KL − budget rises with κ as v rises with λ
        miss, close = local.value - goal, 1e-6 * (ends[1] - ends[0])
        beyond = np.where((at <= ends[0] + close) & (miss >= 0), "low", "")
        beyond = np.where((at >= ends[1] - close) & (miss <= 0), "high", beyond)
        out, size = beyond != "", np.abs(miss)
        sure = (local.se <= SETTLED * tolerance) | (out & (size > 2 * local.se))
        good = out | (size <= np.maximum(tolerance, local.se))
        moved = np.maximum(local.ratio, LEAST_ANSWER) * np.abs(local.change)
        near = (moved <= 2 * tolerance).all(axis=1).any()
        settled = bool(near and (sure & good).all())
        free = (ends[0] <= 0) & (beyond == "low")
        edge = np.where(out & ~free & (size > np.maximum(tolerance, local.se)), beyond, "")
        met = size[:m] <= np.maximum(tolerance, local.se)[:m]
        matters = ((lam > 0) | (local.value[:m] < 0)) & ~met
        answers, done = response.answers(local)[:m] | ~matters, settled or not left
        if done and not answers.all():
            # what does not answer λ says nothing of where its root is
            lam = np.where(answers, lam, self.start)
            local = response.at(np.append(lam, point[-1]))
        return Solution(
            lambda_=pd.Series(lam, index=self.names),
            kappa=float(point[-1]),
            done=done,
            reason=_reason(settled, left, bool((edge != "").any())),
            predicted=self.named(local.value),
            predicted_se=self.named(local.se),
            responds={n: bool(a) for n, a in zip(self.names, answers, strict=True)},
            at_edge={n: str(e) for n, e in zip(self.names, edge[:m], strict=True)},
            kl=float(local.value[-1]) if self.budget is not None else None,
            kl_se=float(local.se[-1]) if self.budget is not None else None,
            kappa_at_edge=str(edge[-1]) if self.budget is not None else "",
        )

    def named(self, values: np.ndarray) -> dict[str, float]:
        return by_name(pd.Series(values[: len(self.names)], index=self.names))


def _reason(settled: bool, left: bool, edge: bool) -> str:
    if settled:
        return "the root lies outside the trained range" if edge else "the target is met"
    return "another trial is needed" if left else "all trials are used"


def _box_step(
    slope: np.ndarray, gradient: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Minimize ½Δ'HΔ + gradient'Δ over low ≤ Δ ≤ high, (m,), by coordinate descent.

    H: slope (m, m), made symmetric and positive definite, whatever the units of each.
    """
    hessian = (slope + slope.T) / 2
    hessian = hessian + np.diag(1e-6 * np.diag(hessian) + 1e-30)
    step = np.zeros_like(gradient)
    for _ in range(MAX_SWEEPS):
        before = step.copy()
        for i in range(len(step)):
            rest = gradient[i] + hessian[i] @ step - hessian[i, i] * step[i]
            step[i] = np.clip(-rest / hessian[i, i], low[i], high[i])
        if np.abs(step - before).max(initial=0.0) <= 1e-6 * (high - low).max(initial=0.0):
            break
    return step
