"""Where a run starts: λ_0 and the points of its tails, from π_ref's samples alone."""

from dataclasses import replace

import pandas as pd

from constrained_dpo.dual.one_shot import first_multipliers
from constrained_dpo.dual.tails import first_tail_points
from constrained_dpo.estimates.slack import halves
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.family import target_of
from constrained_dpo.run.multipliers import demanded, reference_table
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet


def initial_tail_points(run: RunDirectory, recipe: Recipe) -> dict[str, float]:
    """Find the points of the recipe's tails in round 0 from π_ref's samples on the dual prompts, by
    constraint (score units)."""
    return first_tail_points(_on_dual(run), recipe.problem, recipe.dual.max_lambda)


def initial_multipliers(run: RunDirectory, recipe: Recipe) -> pd.Series:
    """Give λ_0: zeros, the given values, or the one-shot minimizer of D on π_ref's samples (MoCAN,
    arXiv:2405.19544), corrected for their number (`first_multipliers`).

    Where trials aim at the levels and some room, so does λ_0: the family that they choose from is
    trained around it. Raises UserError where the multipliers are one-shot for good and the samples
    do not reach a level.
    """
    init = "one_shot" if recipe.dual.method == "one_shot" else recipe.dual.init
    if isinstance(init, dict):
        return recipe.problem.multipliers(init).clip(upper=recipe.dual.max_lambda)
    if init == "zeros":
        return pd.Series(0.0, index=recipe.problem.names)
    table, bound = reference_table(run, recipe), recipe.dual.max_lambda
    first = first_multipliers(table, _with_room(run, recipe), bound)
    if first.replaced and recipe.dual.method == "one_shot":
        raise UserError(
            f"dual.method one_shot: no tilt of {first.responses} responses per prompt reaches the "
            f"level of {' and '.join(first.replaced)}, so λ* is not known; lower the margin, or "
            "raise dual.responses_per_prompt"
        )
    return first.lambda_


def _with_room(run: RunDirectory, recipe: Recipe) -> ConstrainedProblem:
    """The problem at the levels that round 0's trials aim at, as far as π_ref's own spread tells
    the room: half of its responses are judged against the others. No more than the rise that is
    demanded is added: few prompts ask for more room than any policy has."""
    problem = recipe.problem
    target = target_of(run, recipe, pd.Series(0.0, index=problem.names), 0)
    if target is None or target.confidence is None:
        return problem
    room, (demand, _) = target.room(*halves(_on_dual(run))), demanded(run, recipe)
    levels = problem.bounds + pd.Series(room).clip(upper=demand)
    raised = (c.at(float(levels[c.name])) for c in problem.constraints)
    return replace(problem, constraints=tuple(raised))


def _on_dual(run: RunDirectory) -> pd.DataFrame:
    reference = read_parquet(run.reference_file)
    return reference[reference["split"] == "dual"].reset_index(drop=True)
