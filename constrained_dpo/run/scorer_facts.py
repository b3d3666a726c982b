"""What a run knows of its scorers before round 0: the unit of margins in std, the scores'
statistics, what `prepare` measured of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.files import read_json
from data_prep.records import Record
from data_prep.scorers.options import ScorerOptions

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def reference_stds(scored: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """Standard deviation of all scores by column, within and between prompts (score units). Raises
    UserError where it is 0."""
    stds = {name: float(scored[name].std(ddof=0)) for name in names}
    for name, std in stds.items():
        if not std > 0:
            raise UserError(
                f"constraint {name}: its margin is in std, but all {len(scored)} reference "
                f"responses score {scored[name].iloc[0]:g}; "
                "give the margin as a number"
            )
    return stds


def within_std(scored: pd.DataFrame, name: str) -> float:
    """Standard deviation within prompts of a column (score units), the part of its spread that a
    policy can move; 0 where no prompt has two responses."""
    deviations = scored[name] - scored.groupby("prompt_id")[name].transform("mean")
    free = len(scored) - scored["prompt_id"].nunique()
    return float(np.sqrt((deviations**2).sum() / free)) if free else 0.0


def score_statistics(
    scored: pd.DataFrame, scorers: Mapping[str, ScorerOptions]
) -> dict[str, dict[str, float]]:
    """Give by objective mean, std, std within prompts, min, max and quantiles of all scores in the
    table (score units, after the scorer's options); where it clips, `clipped`: the share of scores
    at its bounds."""
    statistics = {}
    for name, options in scorers.items():
        scores = scored[name]
        facts = {
            "mean": scores.mean(),
            "std": scores.std(ddof=0),
            "std_within": within_std(scored, name),
            "min": scores.min(),
            "max": scores.max(),
        }
        facts |= {word: scores.quantile(level) for word, level in QUANTILES.items()}
        if options.clip is not None:
            facts["clipped"] = scores.isin(options.clip).mean()
        statistics[name] = {word: float(value) for word, value in facts.items()}
    return statistics


class ScorerFacts(Record):
    """What `prepare` knows of a scorer: its type and options in words, its scores' statistics on
    π_ref's pool, how far quantization moves them, what an implicit one's are worth."""

    type: str
    options: str
    reference: dict[str, float]
    quantization_drift: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None


def scorer_facts(
    recipe: Recipe, pool: pd.DataFrame, measured: dict[str, dict[str, Any]]
) -> dict[str, ScorerFacts]:
    """Gather what is known of every scorer, by objective.

    pool: π_ref's scored responses; measured: of `Learner.measured_scorers`.
    """
    statistics = score_statistics(pool, recipe.scorers)
    return {
        name: ScorerFacts(
            type=settings.type,
            options=settings.described(),
            reference=statistics[name],
            **measured.get(name, {}),
        )
        for name, settings in recipe.scorers.items()
    }


def read_scorer_facts(run: RunDirectory) -> dict[str, ScorerFacts]:
    """Read scorers.json, by objective."""
    content = read_json(run.scorers_file)
    return {n: ScorerFacts.from_json(facts, run.scorers_file) for n, facts in content.items()}
