"""The exact Lagrangian maximizer over an enumerated world, as a learner. No network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy, TabularWorld
from constrained_dpo.learners.protocol import FitJob
from constrained_dpo.problem import ConstrainedProblem
from data_prep.files import read_json, write_json

POINTS_FILE = "tail_points.json"
"""Where a family's folder keeps the points of its tails."""


@dataclass(frozen=True)
class TabularLearner:
    """The exact maximizer as a learner for `rounds`: the same loop, files and seeds as a LoRA fit,
    no network.

    world: rows in the order of `prompts` (a prompts table). An adapter is a folder holding its
    policy's table.
    """

    world: TabularWorld
    prompts: pd.DataFrame

    def fit(self, job: FitJob) -> None:
        if job.family is None:
            self._write(self._world(job.tail_points).maximizer(job.lambda_), job.output)
        else:  # the family of all maximizers needs no fit
            job.output.mkdir(parents=True)
            write_json(job.output / POINTS_FILE, dict(job.tail_points))
        if job.stretch.keep is not None:
            job.stretch.keep.mkdir()

    def write_member(self, family: Path, lambda_: pd.Series, kappa: float, output: Path) -> None:
        world = self._world(read_json(family / POINTS_FILE))
        problem = replace(world.problem, beta=world.problem.beta / kappa)
        self._write(replace(world, problem=problem).maximizer(lambda_), output)

    def _world(self, tail_points: Mapping[str, float]) -> TabularWorld:
        return replace(self.world, problem=self.world.problem.with_tail_points(tail_points))

    def _write(self, logp: np.ndarray, output: Path) -> None:
        temporary = output.with_name(f".{output.name}.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        np.save(temporary / "policy_logp.npy", logp)
        temporary.rename(output)

    def table(self, adapter: Path | None) -> np.ndarray:
        return self.world.ref_logp if adapter is None else np.load(adapter / "policy_logp.npy")

    def sample(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        logp, row_of = (
            self.table(adapter),
            {pid: i for i, pid in enumerate(self.prompts["prompt_id"])},
        )
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
                        # a response is one token, so its only prefix is the prompt
                        "path_kl": float((weight * (logp[row] - self.world.ref_logp[row])).sum()),
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def _cells(self, responses: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the world's arrays that each response stands for."""
        row_of = {pid: i for i, pid in enumerate(self.prompts["prompt_id"])}
        return responses["prompt_id"].map(row_of).to_numpy(), responses["token_ids"].map(
            lambda ids: int(ids[0])
        ).to_numpy()

    def score(self, responses: pd.DataFrame) -> pd.DataFrame:
        cells = self._cells(responses)
        scored = responses.assign(**{self.world.problem.reward: self.world.reward[cells]})
        return scored.assign(**{name: table[cells] for name, table in self.world.utilities.items()})

    def log_probabilities(self, responses: pd.DataFrame, adapter: Path) -> np.ndarray:
        return self.table(adapter)[self._cells(responses)]

    def identity(self) -> dict[str, Any]:
        return {"policy": "tabular", "law": "tabular"}

    def measured_scorers(self, pool: pd.DataFrame) -> dict[str, dict[str, object]]:
        return {}  # its scores are given: nothing is quantized, no scorer is a policy

    def sampling_cost(self) -> None:
        """None: nothing is sampled by servers."""
        return None

    def truncated(self) -> dict[str, int]:
        return {}

    @property
    def exact(self) -> "TabularLearner":
        return self

    def policy(
        self, adapter: Path, lambda_: pd.Series, problem: ConstrainedProblem
    ) -> dict[str, ExactPolicy]:
        world = replace(self.world, problem=problem)
        return {"all": world.evaluate(self.table(adapter), lambda_)}

    def optimum(self, problem: ConstrainedProblem) -> dict[str, ExactOptimum]:
        return {"all": replace(self.world, problem=problem).exact_optimum}
