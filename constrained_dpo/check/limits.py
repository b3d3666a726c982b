"""What a recipe's numbers of responses and prompts can never carry, said before the run."""

import numpy as np
import pandas as pd

from constrained_dpo.check.precision import Precision
from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.slack import known_bounds
from constrained_dpo.estimates.verdict import look_confidence
from constrained_dpo.monte_carlo import MIN_ESS
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.schema import Recipe
from data_prep.sampling.law import is_policy_law


def certificate_limits(recipe: Recipe) -> list[str]:
    """Say that dual.responses_per_prompt can carry no certificate, where it cannot: K responses
    have an effective sample size of less than K."""
    drawn = recipe.dual.responses_per_prompt
    if drawn > MIN_ESS or not is_policy_law(recipe.sampling):
        return []
    return [
        f"certificate: with dual.responses_per_prompt {drawn} it will be null in every round: it "
        f"needs an effective sample size of {MIN_ESS:g} per prompt, and {drawn} responses have "
        f"less; raise it to {4 * int(MIN_ESS)} or more"
    ]


def verdict_limits(recipe: Recipe, problem: ConstrainedProblem, prompts: pd.DataFrame) -> list[str]:
    """Name the constraints that the test prompts can never show to be satisfied, even if every one
    of them had the highest slack that the score's range allows; prompts: the prompts table."""
    lines = []
    confidence = _verdict_confidence(recipe)
    counts = problem.prompt_counts(prompts)["test"]
    for name, (low, high) in known_bounds(problem, recipe.score_ranges).items():
        if not np.isfinite([low, high]).all():
            continue
        test_prompts = int(counts[name])
        best = mean_interval(np.full(test_prompts, high), 2 * confidence - 1, (low, high))[0]
        if best <= 0:
            lines.append(
                f"verdict on {name}: {test_prompts} test prompts can never say satisfied; even "
                f"with the highest score everywhere the bound of u is {best:.2g}; take more test "
                "prompts"
            )
    return lines


def reachable_verdicts(
    recipe: Recipe, problem: ConstrainedProblem, pool: pd.DataFrame, precision: dict[str, Precision]
) -> list[str]:
    """Name the constraints whose verdict these test prompts and responses will not carry by the
    pilot's samples: the best response of every prompt is no further above the level than chance.

    pool: π_ref's scored responses; precision: as expected of the run.
    """
    from scipy import stats

    lines = []
    names = problem.names
    reference = problem.reference_scores(pool).groupby("prompt_id")[names].mean()
    levels = problem.levels(reference.mean())
    best = problem.scores(pool).groupby("prompt_id")[names].max().mean()
    quantile = float(stats.norm.ppf(_verdict_confidence(recipe)))
    for name in names:
        needed, reach = quantile * precision[name].se["test"], best[name] - levels[name]
        if 0 < reach <= needed:
            lines.append(
                f"verdict on {name}: with {recipe.dual.responses_per_prompt} responses a test "
                f"prompt u must be above {needed:.2g} to be called satisfied, and the best of the "
                f"pilot's responses to every prompt reach {reach:.2g}; raise "
                "dual.responses_per_prompt or take more test prompts"
            )
    return lines


def _verdict_confidence(recipe: Recipe) -> float:
    """Of the verdict at the round that the recipe ends with."""
    return look_confidence(recipe.dual.confidence, recipe.dual.rounds, recipe.dual.rounds)
