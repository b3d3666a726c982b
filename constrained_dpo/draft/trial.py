"""A few answers of the model, scored: what the scale of β, a margin and the answers' length rest
on."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.check.scorers import PROBE
from constrained_dpo.draft.specs import NamedScorer
from constrained_dpo.progress import timed
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.prompts.split import split_prompts
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.scoring import make_scorer, score_texts
from data_prep.settings import derive_seed

PROMPTS, RESPONSES = 8, 4

QUICK_BYTES = 2_000_000_000
"""Weights that load in seconds without a GPU."""


@dataclass(frozen=True)
class ScoreFacts:
    """Scores of one objective: the lowest, highest and mean, the std over all answers, the std
    within a prompt, and how far the best answer of a prompt is above the mean of all; score
    units."""

    low: float
    high: float
    mean: float
    std: float
    std_within: float
    reach: float


@dataclass(frozen=True)
class Trial:
    """What a few answers showed.

    answers: how many; cut_off: how many had no end after `max_new_tokens`; longest: in tokens;
    seconds: to draw and score one; example: (prompt's answer) as text.
    """

    answers: int
    cut_off: int
    longest: int
    seconds: float
    example: str
    scores: dict[str, ScoreFacts]


def quick(models: list[str], gpu_bytes: int) -> bool:
    """Whether these models load in seconds; gpu_bytes: of the GPU, 0 without one."""
    return sum(map(_weight_bytes, models)) <= (gpu_bytes // 2 or QUICK_BYTES)


def _weight_bytes(model: str) -> int:
    """Bytes of a local model's weights; a hub id's are too many to try."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return QUICK_BYTES * 100
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def play_trial(recipe: Recipe) -> Trial:
    """Let the recipe's policy answer a few of its prompts, and score the answers.

    Raises UserError where the policy, a scorer or a prompt is refused.
    """
    from constrained_dpo.learners.lora import LoraLearner

    prompts, _ = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    chosen = prompts[prompts["split"] != "test"].head(PROMPTS).reset_index(drop=True)
    learner = LoraLearner(recipe, chosen)
    drawn, seconds = pd.DataFrame(), 0.0

    def answer(prompts: pd.DataFrame) -> pd.DataFrame:
        return learner.score(
            learner.sample(
                prompts,
                responses_per_prompt=RESPONSES,
                adapter=None,
                source="new",
                seed=derive_seed(recipe.seed, 0, "new"),
            )
        )

    def play() -> None:
        nonlocal drawn, seconds
        answer(chosen.head(1))  # the first call loads, and pays for what later ones do not
        start = time.perf_counter()
        drawn = answer(chosen)
        seconds = time.perf_counter() - start

    timed(f"new: {PROMPTS * RESPONSES} answers of the model", play)
    return Trial(
        answers=len(drawn),
        cut_off=int((~drawn["ended"]).sum()),
        longest=int(drawn["token_ids"].map(len).max()),
        seconds=seconds / len(drawn),
        example=str(drawn["response"].iloc[0]),
        scores={name: score_facts(drawn, name) for name in recipe.problem.objectives},
    )


def score_facts(answers: pd.DataFrame, name: str) -> ScoreFacts:
    """Statistics of a column of scores, of several answers to each prompt."""
    scores, by_prompt = answers[name], answers.groupby("prompt_id")[name]
    return ScoreFacts(
        low=float(scores.min()),
        high=float(scores.max()),
        mean=float(scores.mean()),
        std=float(scores.std(ddof=1)),
        std_within=float(np.sqrt(by_prompt.var(ddof=1).mean())),
        reach=float(by_prompt.max().mean() - scores.mean()),
    )


def try_alone(scorers: Mapping[str, NamedScorer]) -> list[str]:
    """Let the scorers that are quick to load score two canned answers; return the names of the
    others. Raises UserError where one refuses them."""
    prompt, *answers = PROBE
    untried = []
    for name, scorer in scorers.items():
        models = [model for model, _ in scorer.settings.models]
        if scorer.settings.type == "implicit" or not quick(models, 0):
            untried.append(name)
            continue
        made, told = make_scorer(scorer.settings), [prompt] * 2
        try:
            score_texts(
                made, told, answers, options=scorer.settings, name=name, cache=ScoreCache(None)
            )
        except UserError as error:
            raise UserError(f"scorer of {name}: {error}") from error
    return untried
