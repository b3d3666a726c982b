"""A run's family: the law of its label rows' multipliers, its blocks, and what its trials aim at.

All from π_ref's samples, the recipe and the multipliers so far, so that replay finds the same.
"""

import pandas as pd

from constrained_dpo.dual.solution import SolveRule
from constrained_dpo.estimates.slack import slack_bounds
from constrained_dpo.estimates.verdict import look_confidence
from constrained_dpo.fit.family import Family, family_for
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.multipliers import demanded, seen_slack
from constrained_dpo.run.trials import Target
from data_prep.labels.multipliers import FLOOR_SHARE, MultiplierRange
from data_prep.readers.tables import read_parquet

TRIAL_SHARE = 4
"""A trial draws a quarter of dual.responses_per_prompt: eight of them are two full samples."""


def trial_responses(recipe: Recipe) -> int:
    """Count the responses of a prompt in one trial."""
    return max(2, -(-recipe.dual.responses_per_prompt // TRIAL_SHARE))


def multiplier_range(run: RunDirectory, recipe: Recipe, center: pd.Series) -> MultiplierRange:
    """Give the law that a round's rows draw their multipliers from, around `center`."""
    conditional = recipe.fit.conditional
    if conditional is None:
        raise ValueError("fit.conditional is null: the recipe fits no family")
    _, unit = demanded(run, recipe)
    return MultiplierRange(center, FLOOR_SHARE * unit, recipe.trained_range, conditional.kappa)


def family_of(run: RunDirectory, recipe: Recipe, law: MultiplierRange) -> Family:
    """Describe the family of a round whose rows draw their multipliers from `law`; its gates are in
    units of the first multipliers, of those by category of their mean."""
    first = recipe.problem.multipliers(run.state().lambda_[0])
    units = first.where(first > law.floor, law.floor)
    return family_for(recipe.problem.constraints, units, law, recipe.policy.lora.r)


def target_of(run: RunDirectory, recipe: Recipe, center: pd.Series, number: int) -> Target | None:
    """Say what a round's trials aim at: the levels, with the room that `confidence_side` asks for,
    within the range that the family was trained on."""
    if recipe.fit.conditional is None:
        return None
    law, dual, problem = multiplier_range(run, recipe, center), recipe.dual, recipe.problem
    needed, _ = demanded(run, recipe)
    reference = read_parquet(run.reference_file)
    looks = look_confidence(dual.confidence, dual.rounds, dual.rounds)
    rule = SolveRule(
        low=law.low,
        high=law.high.clip(upper=dual.max_lambda),
        tolerance=dual.tolerance / 2 * needed,
        trials=dual.trials,
        kappa=law.kappa,
        kl_budget=recipe.objective.kl_budget,
    )
    return Target(
        problem=problem,
        rule=rule,
        start=center,
        confidence=looks if dual.with_room else None,
        bounds=slack_bounds(problem, recipe.score_ranges, seen_slack(run, problem, number)),
        test_prompts=int(reference.loc[reference["split"] == "test", "prompt_id"].nunique()),
        responses=dual.responses_per_prompt,
    )
