"""`cdpo evaluate`: a policy judged afresh, by the run's scorers, extra ones, and a judge."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from constrained_dpo.evaluation.fresh import (
    Draws,
    Evaluation,
    check_names,
    evaluate_adapter,
    evaluate_round,
    evaluation_prompts,
    round_or_adapter,
)
from constrained_dpo.evaluation.judge_answers import JudgeSettings, judge_evaluation
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import require_same_inputs
from constrained_dpo.run.steering import chosen_round
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet
from data_prep.scorers.settings import ScorerSettings


@dataclass(frozen=True)
class JudgeOptions:
    """A chat server that compares the answers with π_ref's.

    settings: of the server; against: compare with this run's last round instead; unsafe: prompts
    that ask for harm, judged apart from the others.
    """

    settings: JudgeSettings
    against: Path | None = None
    unsafe: Path | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and how.

    round: a number, best, best-dual or last; adapter: instead of a round, a LoRA adapter from
    elsewhere on the run's base; prompts: a file instead of the run's test prompts; scorers: extra
    scores by name; responses: per prompt (None: dual.responses_per_prompt); seed: another draws
    others; more: add fresh responses to an earlier evaluation of the same question; judge: also
    asks a chat server.
    """

    round: str = "last"
    adapter: Path | None = None
    prompts: Path | None = None
    scorers: dict[str, ScorerSettings] = field(default_factory=dict)
    responses: int | None = None
    seed: int = 0
    more: bool = False
    judge: JudgeOptions | None = None

    @property
    def label(self) -> str:
        """What the prompts are called."""
        return self.prompts.stem if self.prompts else "test"


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation gives.

    record: its estimates; left_out: prompts by reason; judged: what a judge said, by set of prompts
    (`prompts`, `unsafe`).
    """

    record: Evaluation
    left_out: dict[str, int]
    judged: dict[str, dict[str, Any]]


def evaluate(run: RunDirectory, options: EvaluationOptions) -> Evaluated:
    """Sample a policy afresh on unseen prompts and judge it; hold the run meanwhile.

    Raises UserError for options that exclude each other, and for inputs that changed since
    `prepare`.
    """
    recipe = run.recipe()
    number = round_or_adapter(run, options.round, options.adapter)
    _check_judge(options)
    check_names(list(options.scorers), recipe)
    columns = recipe.category_columns
    prompts, duplicates = evaluation_prompts(run, recipe, options.prompts, columns)
    learner = LoraLearner(recipe, prompts, run.score_cache, options.scorers)
    with run.locked():
        require_same_inputs(run, learner)
        left_out = {"duplicates": duplicates} | learner.restrict(recipe.fit.max_length)
        count = options.responses or recipe.dual.responses_per_prompt
        draws = Draws(options.label, count, options.seed, options.more)
        if number is None:
            record = evaluate_adapter(run, recipe, learner, Path(options.adapter or ""), draws)
        else:
            record = evaluate_round(run, recipe, learner, number, draws)
        judged = _judged(run, recipe, learner, record, options, draws)
    return Evaluated(record, left_out, judged)


def _check_judge(options: EvaluationOptions) -> None:
    judge = options.judge
    if judge is None:
        return
    for option, value in (("--unsafe", judge.unsafe), ("--prompts", options.prompts)):
        if judge.against and value:
            raise UserError(
                f"--against {judge.against}: compares on the run's test prompts, which {option} "
                "is not; drop one of them"
            )
    if options.adapter and judge.unsafe:
        raise UserError("--unsafe: is drawn from a round of the run; drop --adapter")


def _judged(
    run: RunDirectory,
    recipe: Recipe,
    learner: LoraLearner,
    record: Evaluation,
    options: EvaluationOptions,
    draws: Draws,
) -> dict[str, dict[str, Any]]:
    judge = options.judge
    if judge is None:
        return {}
    confidence = recipe.dual.confidence
    other = None if judge.against is None else _last_responses(RunDirectory(judge.against))
    folder, texts = run.evaluation_folder(record.key), learner.prompt_texts
    judged = {"prompts": judge_evaluation(folder, judge.settings, texts, other, confidence)}
    if judge.unsafe is not None:
        prompts, duplicates = evaluation_prompts(run, recipe, judge.unsafe, recipe.category_columns)
        more = LoraLearner(recipe, prompts, run.score_cache, options.scorers)
        more.policy, more.scorers = learner.policy, learner.scorers
        left_out = {"duplicates": duplicates} | more.restrict(recipe.fit.max_length)
        own_draws = Draws(judge.unsafe.stem, draws.responses_per_prompt, draws.seed)
        number = chosen_round(run, options.round)
        folder = run.evaluation_folder(evaluate_round(run, recipe, more, number, own_draws).key)
        texts = more.prompt_texts
        answers = judge_evaluation(folder, judge.settings, texts, None, confidence)
        judged["unsafe"] = answers | {"left_out": left_out}
    return judged


def _last_responses(run: RunDirectory) -> pd.DataFrame:
    """The last round's responses to a run's test prompts; raises UserError where there is none."""
    samples = read_parquet(run.samples_file(chosen_round(run, "last")))
    return samples[samples["split"] == "test"]
