"""Exact values of a small world, such as the embedded one: every answer listed, scored and weighed
by the policy's own forward."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy, TabularWorld
from constrained_dpo.problem import ConstrainedProblem
from data_prep.scorers.protocol import TokenScorer
from data_prep.scorers.scoring import apply_options

if TYPE_CHECKING:
    from constrained_dpo.learners.lora import LoraLearner


class EmbeddedValues:
    """The `ExactValues` of a learner whose answers are few enough to list, by split (dual and test
    prompts)."""

    def __init__(self, learner: "LoraLearner") -> None:
        self.learner = learner

    @property
    def length(self) -> int:
        """The most tokens of an answer."""
        return self.learner.recipe.sampling.max_new_tokens

    @cached_property
    def tokens(self) -> dict[str, dict[str, list[int]]]:
        """Prompt tokens by split and prompt_id."""
        prompts, tokens = self.learner.prompts, self.learner.prompt_tokens
        return {
            split: {pid: tokens[pid] for pid in prompts["prompt_id"][prompts["split"] == split]}
            for split in ("dual", "test")
        }

    @cached_property
    def texts(self) -> list[str]:
        """Every answer as scorers read it."""
        from data_prep.sampling.enumeration import enumerate_responses
        from data_prep.sampling.generate import decode

        policy = self.learner.policy
        size = policy.model.config.vocab_size
        return decode(policy, enumerate_responses(policy.eos_ids[0], size, self.length))

    @cached_property
    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """By split and objective, (num_prompts, num_responses) score units."""
        return {split: self._scores(tokens) for split, tokens in self.tokens.items()}

    def _scores(self, tokens: dict[str, list[int]]) -> dict[str, np.ndarray]:
        scores = {}
        for name, scorer in self.learner.scorers.items():
            if isinstance(scorer, TokenScorer):
                values = scorer.exact_scores(tokens)
            else:
                told = self.learner.told(scorer)
                prompts = [told[pid] for pid in tokens]
                repeated = ([prompt] * len(self.texts) for prompt in prompts)
                values = np.stack([scorer.score(prompt, self.texts) for prompt in repeated])
            scores[name] = apply_options(values, self.learner.scorer_settings[name])
        return scores

    def logps(self, split: str, adapter: Path | None) -> np.ndarray:
        """log π(y | x) of every answer to a split's prompts, (num_prompts, num_responses) nats."""
        from data_prep.sampling.enumeration import exact_logps

        return exact_logps(self.learner.policy, adapter, self.tokens[split], self.length)

    @cached_property
    def reference_logps(self) -> dict[str, np.ndarray]:
        """log π_ref by split, (num_prompts, num_responses) nats."""
        return {split: self.logps(split, None) for split in self.tokens}

    def world(self, split: str, problem: ConstrainedProblem) -> TabularWorld:
        """One split's prompts as an enumerated world under a problem."""
        scores = self.scores[split]
        prompts = self.learner.prompts[self.learner.prompts["split"] == split]
        utilities = {
            c.column: np.where(c.concerns(prompts).to_numpy()[:, None], scores[c.scored], np.nan)
            for c in problem.constraints
        }
        return TabularWorld(problem, self.reference_logps[split], scores[problem.reward], utilities)

    def policy(
        self, adapter: Path, lambda_: pd.Series, problem: ConstrainedProblem
    ) -> dict[str, ExactPolicy]:
        """Evaluate an adapter's policy on each split, its Lagrangian gap at λ included."""
        values = {}
        for split in self.tokens:
            logp = self.logps(split, adapter)
            values[split] = self.world(split, problem).evaluate(logp, lambda_)
        return values

    def optimum(self, problem: ConstrainedProblem) -> dict[str, ExactOptimum]:
        """Find λ*, P* and the optimal policy's values on each split."""
        return {split: self.world(split, problem).exact_optimum for split in self.tokens}
