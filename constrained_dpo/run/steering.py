"""From a run's tables to the next multipliers: what is steered on, which step is taken, when to
stop."""

import numpy as np
import pandas as pd

from constrained_dpo.dual.feasibility import INFEASIBLE, Feasibility, diagnose_feasibility
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.steps import auto_step_scale, dual_step, step_size_at
from constrained_dpo.estimates.certificate import best_bound
from constrained_dpo.estimates.verdict import one_sided_bounds, recorded_slack
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.scorer_facts import reference_stds
from constrained_dpo.run.selection import converged, violated_on_dual
from data_prep.tables import read_parquet


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
    dual = recipe.dual.model_copy(update={"step_scale": scale.to_dict()})
    recipe = recipe.model_copy(update={"dual": dual})
    run.write_recipe(recipe)
    return recipe


def resolve_margins(run: RunDirectory, recipe: Recipe) -> Recipe:
    """Turns margins in std into score units: writes reference_std of their constraints into
    recipe.yaml.

    It is the standard deviation of all of π_ref's scores on the dual prompts, within and between
    prompts, after the scorer's options. Raises UserError where that is 0.
    """
    wanted = recipe.problem.unresolved
    if not wanted:
        return recipe
    reference = read_parquet(run.reference_file, ["split", *wanted])
    recipe = recipe.with_reference_stds(
        reference_stds(reference[reference["split"] == "dual"], list(wanted))
    )
    run.write_recipe(recipe)
    return recipe


def initial_multipliers(run: RunDirectory, recipe: Recipe) -> pd.Series:
    """λ_0: zeros, the given values, or the one-shot minimizer of D on π_ref's samples (MoCAN,
    arXiv:2405.19544)."""
    init = "one_shot" if recipe.dual.method == "one_shot" else recipe.dual.init
    if isinstance(init, dict):
        return recipe.problem.multipliers(init).clip(upper=recipe.dual.max_lambda)
    if init == "zeros":
        return pd.Series(0.0, index=recipe.problem.names)
    return solve_one_shot(
        reference_table(run, recipe), recipe.problem, max_lambda=recipe.dual.max_lambda
    ).lambda_


def steered_on(recipe: Recipe, record: dict) -> dict[str, float]:
    """v, the slack that moves λ: u itself, or its one-sided lower bound (dual.confidence_side)."""
    if recipe.dual.confidence_side == "none":
        return record["u"]
    return one_sided_bounds(recorded_slack(record), recipe.dual.confidence)["low"].to_dict()


def next_multipliers(recipe: Recipe, record: dict) -> tuple[pd.Series, str]:
    """λ_{t+1} and by which step, from the record of round t (without its λ_next)."""
    dual, problem = recipe.dual, recipe.problem
    lambda_ = problem.multipliers(record["lambda"])
    if dual.method in ("one_shot", "fixed"):
        return lambda_, "kept"
    if dual.step_scale == "auto":
        raise ValueError(
            "dual.step_scale is not resolved yet; pass the recipe that `prepare` returned, or the "
            "run's own"
        )
    unit = pd.Series(
        dual.step_scale if isinstance(dual.step_scale, dict) else 1.0,
        index=problem.names,
        dtype=float,
    )
    step = step_size_at(dual.step_size, dual.step_schedule, record["round"]) * unit
    return dual_step(
        lambda_, pd.Series(record["steered_on"], dtype=float), step, dual.max_lambda
    ), "subgradient"


def demanded(run: RunDirectory, recipe: Recipe) -> tuple[pd.Series, pd.Series]:
    """By constraint: the rise over π_ref that is asked for, |a − ḡ_ref|, at least a tenth of std(g)
    (score units); std(r)/std(g)."""
    table, problem = reference_table(run, recipe), recipe.problem
    means = pd.Series(table.reference_means(), index=problem.names)
    spread = pd.Series(table.utilities.std(axis=0), index=problem.names)
    needed = np.maximum((problem.levels(means) - means).abs(), spread / 10)
    return needed, table.reward.std() / spread


def diagnose_run(run: RunDirectory, recipe: Recipe) -> Feasibility:
    """What all responses seen so far say about the constraints: π_ref's and every round's on the
    dual prompts, levels from π_ref's.

    Each response counts once: a policy that repeats itself is no evidence that nothing better
    exists.
    """
    columns = ["prompt_id", "split", "response", *recipe.problem.objectives]
    parts = [
        read_parquet(path, columns)
        for path in (run.reference_file, *map(run.samples_file, range(run.rounds_done())))
    ]
    parts = [part[part["split"] == "dual"] for part in parts]
    levels = recipe.problem.levels(
        parts[0].groupby("prompt_id")[recipe.problem.names].mean().mean()
    )
    seen = pd.concat(parts, ignore_index=True).drop_duplicates(["prompt_id", "response"])
    return diagnose_feasibility(ScoreTable.from_frame(seen, recipe.problem), recipe.problem, levels)


def reason_to_stop(run: RunDirectory, recipe: Recipe, until_converged: bool) -> str | None:
    """Why no further round should be played, in a line, or None.

    While a constraint is violated on the dual prompts: all responses seen so far show that no
    policy can meet it (infeasible), or its λ rests at dual.max_lambda.
    """
    records = [run.round_record(t) for t in range(run.rounds_done())]
    last, bound = records[-1], recipe.dual.max_lambda
    if recipe.dual.method not in ("one_shot", "fixed") and violated_on_dual(
        last, recipe.dual.confidence
    ):
        found = diagnose_run(run, recipe)
        stuck = [n for n, u in last["u"].items() if u < 0 and last["lambda"][n] >= bound]
        if found.verdict == INFEASIBLE or stuck:
            where = (
                f"λ of {' and '.join(stuck)} is at dual.max_lambda {bound:g} and violated still. "
                if stuck
                else ""
            )
            return f"stopped after round {last['round']}: {where}{found.sentence()}"
    if until_converged:
        needed, unit = demanded(run, recipe)
        best = best_bound(records)
        lowest = None if best is None else best["dual_value"]
        if converged(last, needed, unit, recipe.dual.tolerance, recipe.dual.target_gap, lowest):
            return (
                f"converged in round {last['round']}: the constraints are met within "
                f"{100 * recipe.dual.tolerance:g} % and λ rests"
            )
    return None
