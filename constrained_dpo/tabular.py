"""Worlds whose every response is listed: the exact optimum, the exact value of any policy, and the exact Lagrangian maximizer as a learner.

With all responses enumerated, expectations are sums: λ* and P* = D(λ*) (strong duality over all policies, CAID,
arXiv:2505.19387), E[r], E[g] and KL of a policy follow from its table of
log-probabilities. Arrays are (num_prompts, num_responses), one row per prompt.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.dual import ScoreTable
from constrained_dpo.one_shot import OneShotSolution, solve_one_shot
from constrained_dpo.problem import ConstrainedProblem


@dataclass(frozen=True)
class TabularWorld:
    """problem; ref_logp (num_prompts, num_responses) in nats; reward, same shape; utilities by constraint, same shape (score units)."""

    problem: ConstrainedProblem
    ref_logp: np.ndarray
    reward: np.ndarray
    utilities: dict[str, np.ndarray]

    @cached_property
    def score_table(self) -> ScoreTable:
        """Every response once: log-weight log π_ref + log num_responses makes the mean over rows an exact expectation."""
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
        means = {n: float((np.exp(self.ref_logp) * self.utilities[n]).sum(1).mean()) for n in self.problem.names}
        return self.problem.levels(pd.Series(means, dtype=float))

    @cached_property
    def optimum(self) -> OneShotSolution:
        """λ*, P* (its dual_value) and the optimal policy's means."""
        return solve_one_shot(self.score_table, self.problem, self.levels)

    def maximizer(self, lambda_: pd.Series) -> np.ndarray:
        """log π*_λ = log π_ref + (r + λ·g)/β − log Z, (num_prompts, num_responses): the exact maximizer of L(·, λ)."""
        score = self.reward + sum((lambda_[n] * self.utilities[n] for n in self.problem.names), np.zeros_like(self.reward))
        logp = self.ref_logp + score / self.problem.beta
        return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)

    def lagrangian_gap(self, logp: np.ndarray, lambda_: pd.Series) -> float:
        """D(λ) − L(π, λ) = β E_x KL(π ‖ π*_λ) of the policy with this table (score units)."""
        return self.problem.beta * float((np.exp(logp) * (logp - self.maximizer(lambda_))).sum(1).mean())

    def evaluate(self, logp: np.ndarray) -> dict[str, object]:
        """Exact means over prompts of the policy with this table: reward, utilities, u, kl (nats), objective E[r] − β KL."""
        weight = np.exp(logp)
        utilities = {n: float((weight * self.utilities[n]).sum(1).mean()) for n in self.problem.names}
        reward = float((weight * self.reward).sum(1).mean())
        kl = float((weight * np.where(weight > 0, logp - self.ref_logp, 0.0)).sum(1).mean())
        return {
            "reward": reward,
            "utilities": utilities,
            "u": {n: utilities[n] - float(self.levels[n]) for n in self.problem.names},
            "kl": kl,
            "objective": reward - self.problem.beta * kl,
        }


@dataclass(frozen=True)
class TabularLearner:
    """The exact maximizer as a learner for `rounds`: the same loop, files and seeds as a LoRA fit, no network.

    world: rows in the order of `prompts` (a prompts table). An adapter is a folder holding its policy's table.
    """

    world: TabularWorld
    prompts: pd.DataFrame

    def fit(self, labels: pd.DataFrame, pool: pd.DataFrame, *, lambda_: pd.Series, previous: Path | None, output: Path, seed: int) -> None:
        temporary = output.with_name(f".{output.name}.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        np.save(temporary / "policy_logp.npy", self.world.maximizer(lambda_))
        temporary.rename(output)

    def table(self, adapter: Path | None) -> np.ndarray:
        return self.world.ref_logp if adapter is None else np.load(adapter / "policy_logp.npy")

    def sample(self, prompts: pd.DataFrame, *, responses_per_prompt: int, adapter: Path | None, source: str, seed: int) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        logp, row_of = self.table(adapter), {pid: i for i, pid in enumerate(self.prompts["prompt_id"])}
        tables = []
        for pid in prompts["prompt_id"]:
            row = row_of[pid]
            weight = np.exp(logp[row])
            drawn = rng.choice(len(weight), responses_per_prompt, p=weight / weight.sum())
            tables.append(
                pd.DataFrame(
                    {
                        "prompt_id": pid,
                        "response_id": [f"{source}/{pid}/{k}" for k in range(responses_per_prompt)],
                        "response": [f"response {i}" for i in drawn],
                        "token_ids": [np.array([i], dtype=np.int32) for i in drawn],
                        "ended": True,
                        "source": source,
                        "sample_logp": logp[row, drawn],
                        "policy_logp": logp[row, drawn],
                        "ref_logp": self.world.ref_logp[row, drawn],
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def _cells(self, responses: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the world's arrays that each response stands for."""
        row_of = {pid: i for i, pid in enumerate(self.prompts["prompt_id"])}
        return responses["prompt_id"].map(row_of).to_numpy(), responses["token_ids"].map(lambda ids: int(ids[0])).to_numpy()

    def score(self, responses: pd.DataFrame) -> pd.DataFrame:
        cells = self._cells(responses)
        scored = responses.assign(**{self.world.problem.reward: self.world.reward[cells]})
        return scored.assign(**{n: self.world.utilities[n][cells] for n in self.world.problem.names})

    def log_probabilities(self, responses: pd.DataFrame, adapter: Path) -> np.ndarray:
        return self.table(adapter)[self._cells(responses)]

    def identity(self) -> dict[str, object]:
        return {"policy": "tabular", "law": "tabular"}

    def measured_scorers(self, pool: pd.DataFrame) -> dict[str, dict]:
        return {}  # its scores are given: nothing is quantized, no scorer is a policy

    def exact(self, adapter: Path, lambda_: pd.Series) -> dict[str, dict] | None:
        logp = self.table(adapter)
        return {"all": self.world.evaluate(logp) | {"lagrangian_gap": self.world.lagrangian_gap(logp, lambda_)}}

    def optimum(self) -> dict[str, dict] | None:
        return {"all": exact_optimum(self.world)}


def exact_optimum(world: TabularWorld) -> dict[str, object]:
    """λ*, P* and the exact values of π_ref and of the optimal policy, for `exact.json`."""
    solution = world.optimum
    return {
        "lambda": solution.lambda_.to_dict(),
        "objective": solution.dual_value,
        "optimal": world.evaluate(world.maximizer(solution.lambda_)),
        "reference": world.evaluate(world.ref_logp),
    }
