"""A dataset's responses in the pool (`pool.source: dataset, both`): tokens, log π_ref and scores,
each computed once.

They are kept apart, in pool/dataset.parquet, because nobody knows the law they were drawn from: the
fit reads them, and nothing that estimates (λ_0, baselines, u, the certificate) does.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from constrained_dpo.learners.collect import Collection, collect
from data_prep.prompts.preference_rows import DatasetAnswers, answer_table, read_answers

if TYPE_CHECKING:
    from constrained_dpo.learners.lora import LoraLearner


@dataclass(frozen=True)
class AnswersOnFile:
    """Stands where `collect` has a learner: instead of sampling, it gives the dataset's answers to
    a prompt, with their log π_ref.

    table: from `answer_table`; scored: whether the learner's scorers are asked too.
    """

    learner: "LoraLearner"
    table: pd.DataFrame
    scored: bool

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Row numbers of the table by prompt_id."""
        groups = self.table.groupby("prompt_id", sort=False).indices
        return {str(pid): np.asarray(rows) for pid, rows in groups.items()}

    def sample(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        """All answers to these prompts; nothing is drawn, so only `prompts` matters."""
        rows = np.concatenate([self.rows[pid] for pid in prompts["prompt_id"]])
        answers = self.table.iloc[rows].reset_index(drop=True)
        return answers.assign(ref_logp=self.learner.log_probabilities(answers, adapter))

    def score(self, responses: pd.DataFrame) -> pd.DataFrame:
        return self.learner.score(responses) if self.scored else responses


def tokenized_answers(
    learner: "LoraLearner", *, label: str | None = None, test: bool = False
) -> tuple[DatasetAnswers, pd.DataFrame]:
    """The answers to the fit and dual prompts (to the test prompts with `test`), with their pairs
    under `label`, and as rows of the responses table. Raises UserError as `read_answers` and
    `answer_table` do."""
    recipe, policy = learner.recipe, learner.policy
    prompts = learner.prompts[(learner.prompts["split"] == "test") == test]
    own_source = test and not isinstance(recipe.prompts.test, float)
    answers = read_answers(recipe.prompts, prompts["prompt_id"], label=label, test=own_source)
    limit = min(recipe.fit.max_length, policy.window or recipe.fit.max_length)
    texts = prompts.set_index("prompt_id")["prompt"]
    table = answer_table(
        answers,
        texts,
        learner.prompt_tokens,
        recipe.prompts,
        policy.tokenizer,
        policy.eos_ids,
        limit,
    )
    return answers, table


def answer_counts(
    table: pd.DataFrame, num_prompts: int, left_out: dict[str, int]
) -> dict[str, object]:
    """What was taken, JSON-ready: responses, prompts with one, without one, and the responses left
    out by reason (`answers.LEFT_OUT`)."""
    covered = int(table["prompt_id"].nunique())
    return {
        "responses": len(table),
        "prompts": covered,
        "prompts_without": num_prompts - covered,
        "left_out": dict(left_out),
    }


def collect_answers(
    learner: "LoraLearner",
    table: pd.DataFrame,
    folder: Path,
    *,
    phase: str,
    scored: bool,
    given: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Compute log π_ref of the table's answers and, where `scored`, the objectives' scores.

    folder: where shards are committed, as those of samples are. given: the same answers with their
    log π_ref, from another run.
    """
    prompts = learner.prompts[learner.prompts["prompt_id"].isin(table["prompt_id"])]
    job = Collection(
        phase=phase,
        folder=folder,
        source="dataset",
        responses_per_prompt=int(table.groupby("prompt_id").size().max()),
        shard_size=learner.recipe.sampling.batch_size,
        objectives=learner.recipe.problem.columns if scored else [],
        seed=learner.recipe.seed,
        rule=None,
        given=given,
    )
    return collect(AnswersOnFile(learner, table, scored), prompts, job)
