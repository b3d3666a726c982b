"""What a run's multipliers rest on, scales and margins among it, and λ_{t+1} from a round's
slack."""

from typing import Literal

import pandas as pd

from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.steps import auto_step_scale, dual_step, step_size_at
from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.estimates.score_scale import loss_by_scale, score_scale
from constrained_dpo.estimates.slack import prompt_slack, reference_slack
from constrained_dpo.problem import ConstrainedProblem, by_name
from constrained_dpo.recipe.dual import DualSettings
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.scorer_facts import reference_stds
from data_prep.readers.tables import read_parquet


def reference_table(run: RunDirectory, recipe: Recipe) -> ScoreTable:
    """All of π_ref's samples on fit and dual prompts."""
    reference = read_parquet(run.reference_file)
    samples = [reference[reference["split"] == "dual"]]
    if (
        recipe.pool.source != "dataset"
    ):  # the fit prompts have been sampled too; a dataset's responses are not π_ref's
        samples.insert(0, read_parquet(run.pool_file(None)))
    return ScoreTable.from_frame(pd.concat(samples, ignore_index=True), recipe.problem)


def resolve_step_scale(run: RunDirectory, recipe: Recipe) -> Recipe:
    """Turns step_scale auto into numbers, in recipe.yaml."""
    if recipe.dual.step_scale != "auto":
        return recipe
    scale = auto_step_scale(reference_table(run, recipe), recipe.problem)
    dual = recipe.dual.model_copy(update={"step_scale": by_name(scale)})
    recipe = recipe.model_copy(update={"dual": dual})
    run.write_recipe(recipe)
    return recipe


def resolve_margins(run: RunDirectory, recipe: Recipe) -> Recipe:
    """Turn margins in std into score units: write reference_std of their constraints into
    recipe.yaml.

    It is the standard deviation of all of π_ref's scores on the dual prompts, within and between
    prompts, after the scorer's options. Raises UserError where that is 0.
    """
    if not recipe.problem.unresolved:
        return recipe
    unresolved = [c.name for c in recipe.objective.constraints if c.margins_in_std]
    reference = read_parquet(run.reference_file, ["split", *unresolved])
    recipe = recipe.with_reference_stds(
        reference_stds(reference[reference["split"] == "dual"], unresolved)
    )
    run.write_recipe(recipe)
    return recipe


def steered_on(dual: DualSettings, measured: Measurement) -> dict[str, float]:
    """Choose v, the slack that moves λ: u itself, or its one-sided lower bound.

    measured: on the dual prompts. Score units, by constraint.
    """
    return measured.u_low if dual.with_room else measured.u


def next_multipliers(
    recipe: Recipe, round_number: int, lambda_: pd.Series, slack: dict[str, float]
) -> tuple[pd.Series, str]:
    """Take the dual step: λ_{t+1} and the kind of the step.

    slack: of `steered_on`. Source: CAID, arXiv:2505.19387, Algorithm 1.
    """
    dual, problem = recipe.dual, recipe.problem
    if dual.method in ("one_shot", "fixed") or not problem.names:
        return lambda_, "kept"
    if dual.step_scale == "auto":
        raise ValueError(
            "dual.step_scale is not resolved yet; pass the recipe that `prepare` returned, or the "
            "run's own"
        )
    scale = dual.step_scale if isinstance(dual.step_scale, dict) else 1.0
    unit = pd.Series(scale, index=problem.names, dtype=float)
    step = step_size_at(dual.step_size, dual.step_schedule, round_number) * unit
    v = pd.Series(slack, index=problem.names, dtype=float)
    return dual_step(lambda_, v, step, dual.max_lambda), "subgradient"


def demanded(run: RunDirectory, recipe: Recipe) -> tuple[pd.Series, pd.Series]:
    """Give by constraint the rise over π_ref that is demanded, |a − ḡ_ref|, at least a tenth of
    std(g) (score units), and std(r)/std(g); stds within prompts."""
    table, problem = reference_table(run, recipe), recipe.problem
    spread = pd.Series(table.within_spread(), index=problem.names)
    rise = (table.levels(problem) - table.reference_means()).abs()
    needed = rise.where(rise > spread / 10, spread / 10)
    return needed, table.within_std(table.reward) / spread


def chosen_loss(run: RunDirectory, recipe: Recipe) -> Literal["logistic", "listwise"]:
    """Choose the loss of a run's fits: the recipe's, or by how many pairs of π_ref's responses
    saturate under λ_0 (auto)."""
    if recipe.fit.loss != "auto":
        return recipe.fit.loss
    first = recipe.problem.multipliers(run.state().lambda_[0])
    reference = read_parquet(run.reference_file, ["prompt_id", *recipe.problem.columns])
    return loss_by_scale(recipe.fit.grouped, score_scale(reference, recipe.problem, first, ""))


def seen_slack(
    run: RunDirectory, problem: ConstrainedProblem, rounds: int | None = None
) -> list[pd.DataFrame]:
    """Compute the slack by prompt in π_ref's table and those of the first `rounds` rounds (None: of
    all that are done): what bounds it where no range does.

    Each (num_prompts, m) by prompt_id, score units.
    """
    reference = read_parquet(run.reference_file)
    count = run.rounds_done() if rounds is None else rounds
    tables = (read_parquet(run.samples_file(number)) for number in range(count))
    return [
        reference_slack(reference, problem),
        *(prompt_slack(samples, reference, problem) for samples in tables),
    ]
