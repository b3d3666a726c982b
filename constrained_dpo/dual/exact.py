"""Worlds whose every response is listed: the exact optimum, the exact value of any policy, and the
exact Lagrangian maximizer.

With all responses enumerated, expectations are sums: λ* and P* = D(λ*) (strong duality over all
policies, CAID, arXiv:2505.19387), E[r], E[g] and KL of a policy follow from its table of
log-probabilities. Arrays are (num_prompts, num_responses), one row per prompt.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from pydantic import Field

from constrained_dpo.dual.one_shot import OneShotSolution, solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.tails import best_tails, starts_at
from constrained_dpo.problem import ConstrainedProblem, by_name
from data_prep.records import Record


class ExactPolicy(Record):
    """A policy's exact means over prompts: reward and utilities (score units), u by constraint, KL
    (nats), objective E[r] − β KL at `beta`; and its Lagrangian gap D(λ) − L(π, λ) where a λ was
    given."""

    reward: float
    utilities: dict[str, float]
    u: dict[str, float]
    kl: float
    beta: float
    objective: float
    lagrangian_gap: float | None = None


class ExactOptimum(Record):
    """λ*, P* (`objective`), and the exact values of the optimal policy and of π_ref; tail_points:
    of the optimal policy, by constraint (score units)."""

    lambda_: dict[str, float] = Field(alias="lambda")
    objective: float
    optimal: ExactPolicy
    reference: ExactPolicy
    tail_points: dict[str, float] = Field(default_factory=dict)

    def has_beta_of(self, policy: ExactPolicy) -> bool:
        """Tell whether a policy's objective and P* have one β."""
        return bool(np.isclose(policy.beta, self.optimal.beta))

    def share_closed(self, policy: ExactPolicy) -> float | None:
        """Give the share of the gap from π_ref's objective to P* that a policy closes.

        None where P* lies below π_ref's objective, as with margins that cost more than there is;
        and where the policy's objective has another β, as with a budget of KL.
        """
        if not self.has_beta_of(policy):
            return None
        gap = self.objective - self.reference.objective
        return (policy.objective - self.reference.objective) / gap if gap > 0 else None


class ExactValues(Protocol):
    """Values without sampling error, for worlds whose every response is listed; by split, or under
    "all" where the world does not tell splits apart."""

    def policy(
        self, adapter: Path, lambda_: pd.Series, problem: ConstrainedProblem
    ) -> dict[str, ExactPolicy]:
        """Evaluate an adapter's policy, its Lagrangian gap at λ included."""

    def optimum(self, problem: ConstrainedProblem) -> dict[str, ExactOptimum]:
        """Find the constrained optimum."""


@dataclass(frozen=True)
class TabularWorld:
    """problem; ref_logp (num_prompts, num_responses) in nats; reward, same shape; utilities by the
    column that a constraint is on (`Constraint.column`), same shape (score units), null on prompts
    that the constraint does not concern."""

    problem: ConstrainedProblem
    ref_logp: np.ndarray
    reward: np.ndarray
    utilities: dict[str, np.ndarray]

    @cached_property
    def score_table(self) -> ScoreTable:
        """Every response once: log-weight log π_ref + log num_responses makes the mean over rows an
        exact expectation."""
        prompts, responses = self.ref_logp.shape
        stacked = [values.ravel() for values in self._values.values()]
        return ScoreTable(
            reward=self.reward.ravel(),
            utilities=np.nan_to_num(np.stack(stacked, axis=1))
            if stacked
            else np.zeros((self.reward.size, 0)),
            log_weight=(self.ref_logp + np.log(responses)).ravel(),
            starts=np.arange(prompts) * responses,
            counts=np.full(prompts, responses),
            concerned=self._concerned,
        )

    @property
    def _concerned(self) -> np.ndarray | None:
        rows = [~np.isnan(values[:, 0]) for values in self._values.values()]
        return None if all(row.all() for row in rows) else np.stack(rows)

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        """The values whose means are constrained, (num_prompts, num_responses), by constraint."""
        return {
            c.name: c.measure.values(self.utilities[c.column]) for c in self.problem.constraints
        }

    def _at_tails(self, weight: np.ndarray, problem: ConstrainedProblem) -> ConstrainedProblem:
        """The problem with its tails at the quantiles of a policy, weight: (num_prompts,
        num_responses), the probabilities of its answers."""
        moved = (
            replace(
                c, measure=c.measure.at_tail_of(self.utilities[c.column].ravel(), weight.ravel())
            )
            for c in problem.constraints
        )
        return replace(problem, constraints=tuple(moved))

    def _means(self, weight: np.ndarray) -> dict[str, float]:
        """What is constrained of a policy: means, tails and rates, by constraint (score units)."""
        values = replace(self, problem=self._at_tails(weight, self.problem))._values
        return {n: float(np.nanmean((weight * v).sum(1))) for n, v in values.items()}

    @cached_property
    def levels(self) -> pd.Series:
        """a_i, by constraint."""
        return self.problem.levels(pd.Series(self._means(np.exp(self.ref_logp)), dtype=float))

    @cached_property
    def optimum(self) -> OneShotSolution:
        """λ*, P* (its dual_value) and the optimal policy's means."""
        return solve_one_shot(self.score_table, self.problem, self.levels)

    def maximizer(self, lambda_: pd.Series) -> np.ndarray:
        """log π*_λ = log π_ref + (r + λ·g)/β − log Z, (num_prompts, num_responses): the exact
        maximizer of L(·, λ)."""
        score = self.reward + sum(
            (lambda_[n] * np.nan_to_num(values) for n, values in self._values.items()),
            np.zeros_like(self.reward),
        )
        logp = self.ref_logp + score / self.problem.beta
        return np.asarray(logp - np.logaddexp.reduce(logp, axis=1, keepdims=True))

    def lagrangian_gap(self, logp: np.ndarray, lambda_: pd.Series) -> float:
        """D(λ) − L(π, λ) = β E_x KL(π ‖ π*_λ) of the policy with this table (score units)."""
        return self.problem.beta * float(
            (np.exp(logp) * (logp - self.maximizer(lambda_))).sum(1).mean()
        )

    def evaluate(self, logp: np.ndarray, lambda_: pd.Series | None = None) -> ExactPolicy:
        """Evaluate the policy with this table of log-probabilities, (num_prompts, num_responses).

        lambda_: also its Lagrangian gap at these multipliers.
        """
        weight = np.exp(logp)
        utilities = self._means(weight)
        reward = float((weight * self.reward).sum(1).mean())
        kl = float((weight * np.where(weight > 0, logp - self.ref_logp, 0.0)).sum(1).mean())
        return ExactPolicy(
            reward=reward,
            utilities=utilities,
            u={n: utilities[n] - float(self.levels[n]) for n in self.problem.names},
            kl=kl,
            beta=self.problem.beta,
            objective=reward - self.problem.beta * kl,
            lagrangian_gap=None if lambda_ is None else self.lagrangian_gap(logp, lambda_),
        )

    @cached_property
    def exact_optimum(self) -> ExactOptimum:
        """λ*, P* and the exact values of π_ref and of the optimal policy; of tails at their best
        points (`tails`)."""
        best = self.at_best_tails
        solution = best.optimum
        return ExactOptimum(
            lambda_=by_name(solution.lambda_),
            objective=solution.dual_value,
            optimal=best.evaluate(best.maximizer(solution.lambda_)),
            reference=self.evaluate(self.ref_logp),
            tail_points=best.problem.tail_points,
        )

    @cached_property
    def at_best_tails(self) -> "TabularWorld":
        """The world with its tails at the points of the best policy."""
        if not self.problem.has_tails:
            return self

        def step(problem: ConstrainedProblem) -> tuple[float, ConstrainedProblem]:
            world = replace(self, problem=problem)
            weight = np.exp(world.maximizer(world.optimum.lambda_))
            return world.optimum.dual_value, world._at_tails(weight, problem)

        reference = np.exp(self.ref_logp)
        starts = starts_at(self.problem, lambda problem: self._at_tails(reference, problem))
        return replace(self, problem=best_tails(starts, step))
