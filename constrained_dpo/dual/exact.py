"""Worlds whose every response is listed: the exact optimum, the exact value of any policy, and the
exact Lagrangian maximizer as a learner.

With all responses enumerated, expectations are sums: λ* and P* = D(λ*) (strong duality over all
policies, CAID, arXiv:2505.19387), E[r], E[g] and KL of a policy follow from its table of
log-probabilities. Arrays are (num_prompts, num_responses), one row per prompt.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from constrained_dpo.dual.one_shot import OneShotSolution, solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem


def share_of_gap_closed(exact: dict, optimum: dict) -> float:
    """(objective − objective of π_ref) / (P* − objective of π_ref), exact values of one split."""
    start = optimum["reference"]["objective"]
    gap = optimum["objective"] - start
    return float((exact["objective"] - start) / gap) if gap > 0 else float(np.nan)


@dataclass(frozen=True)
class TabularWorld:
    """problem; ref_logp (num_prompts, num_responses) in nats; reward, same shape; utilities by
    constraint, same shape (score units)."""

    problem: ConstrainedProblem
    ref_logp: np.ndarray
    reward: np.ndarray
    utilities: dict[str, np.ndarray]

    @cached_property
    def score_table(self) -> ScoreTable:
        """Every response once: log-weight log π_ref + log num_responses makes the mean over rows an
        exact expectation."""
        prompts, responses = self.ref_logp.shape
        stacked = [self.utilities[n].ravel() for n in self.problem.names]
        return ScoreTable(
            reward=self.reward.ravel(),
            utilities=np.stack(stacked, axis=1) if stacked else np.zeros((self.reward.size, 0)),
            log_weight=(self.ref_logp + np.log(responses)).ravel(),
            starts=np.arange(prompts) * responses,
            counts=np.full(prompts, responses),
        )

    @cached_property
    def levels(self) -> pd.Series:
        """a_i, by constraint."""
        means = {
            n: float((np.exp(self.ref_logp) * self.utilities[n]).sum(1).mean())
            for n in self.problem.names
        }
        return self.problem.levels(pd.Series(means, dtype=float))

    @cached_property
    def optimum(self) -> OneShotSolution:
        """λ*, P* (its dual_value) and the optimal policy's means."""
        return solve_one_shot(self.score_table, self.problem, self.levels)

    def maximizer(self, lambda_: pd.Series) -> np.ndarray:
        """log π*_λ = log π_ref + (r + λ·g)/β − log Z, (num_prompts, num_responses): the exact
        maximizer of L(·, λ)."""
        score = self.reward + sum(
            (lambda_[n] * self.utilities[n] for n in self.problem.names), np.zeros_like(self.reward)
        )
        logp = self.ref_logp + score / self.problem.beta
        return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)

    def lagrangian_gap(self, logp: np.ndarray, lambda_: pd.Series) -> float:
        """D(λ) − L(π, λ) = β E_x KL(π ‖ π*_λ) of the policy with this table (score units)."""
        return self.problem.beta * float(
            (np.exp(logp) * (logp - self.maximizer(lambda_))).sum(1).mean()
        )

    def evaluate(self, logp: np.ndarray) -> dict[str, object]:
        """Exact means over prompts of the policy with this table: reward, utilities, u, kl (nats),
        objective E[r] − β KL."""
        weight = np.exp(logp)
        utilities = {
            n: float((weight * self.utilities[n]).sum(1).mean()) for n in self.problem.names
        }
        reward = float((weight * self.reward).sum(1).mean())
        kl = float((weight * np.where(weight > 0, logp - self.ref_logp, 0.0)).sum(1).mean())
        return {
            "reward": reward,
            "utilities": utilities,
            "u": {n: utilities[n] - float(self.levels[n]) for n in self.problem.names},
            "kl": kl,
            "objective": reward - self.problem.beta * kl,
        }


def exact_optimum(world: TabularWorld) -> dict[str, object]:
    """λ*, P* and the exact values of π_ref and of the optimal policy, for `exact.json`."""
    solution = world.optimum
    return {
        "lambda": solution.lambda_.to_dict(),
        "objective": solution.dual_value,
        "optimal": world.evaluate(world.maximizer(solution.lambda_)),
        "reference": world.evaluate(world.ref_logp),
    }
