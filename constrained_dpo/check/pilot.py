"""A small pilot before a run: how precise u will be, how many prompts a precision needs, how long
each phase will take, and how much memory.

A few dual prompts are answered by π_ref, scored, and fitted for a few steps by the real trainer;
everything is thrown away afterwards. How few: what a minute holds (`pilot_size`).
"""

import json
import math
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.check.expected_time import Timing, expected_seconds
from constrained_dpo.check.limits import reachable_verdicts
from constrained_dpo.check.pilot_size import (
    TIMED_STEPS,
    PilotSize,
    pilot_size,
    responses_per_prompt,
)
from constrained_dpo.check.precision import Precision, expected_precision
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.tails import first_tail_points
from constrained_dpo.estimates.draws import draw_rule, require_policy_draws
from constrained_dpo.estimates.score_scale import ScoreScale, initial_multipliers, score_scale
from constrained_dpo.fit.family import Family, family_for, scaled_weights, write_adapter
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.progress import timed
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.scorer_facts import reference_stds, score_statistics
from data_prep.labels.groups import label_groups
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.preferences import label_pairs
from data_prep.records import Record
from data_prep.settings import derive_seed


class Pilot(Record):
    """What a pilot has measured.

    scores: statistics by objective; margins: those in std, as (number of std, std in score units);
    calibrations: of implicit scorers; seconds: expected, of prepare, of a round's fit and rescore,
    and of the run; peak_gib: of this process, on the GPU where there is one; bounded: whether less
    was played because of the limit of time.
    """

    prompts: int
    responses_per_prompt: int
    cut_off_fraction: float
    example: str
    scores: dict[str, dict[str, float]]
    margins: dict[str, tuple[float, float]]
    precision: dict[str, Precision]
    calibrations: dict[str, dict[str, Any]]
    scale: ScoreScale
    seconds: dict[str, float]
    peak_gib: float
    bounded: bool


def run_pilot(
    learner: LoraLearner, target_se: dict[str, float], given_responses: int = 0
) -> tuple[Pilot, list[str]]:
    """Play the pilot; return what it measured, and warnings of constraints out of reach.

    target_se: standard error of u to aim at, by constraint; given_responses: how many responses of
    the dataset the pool will hold. Raises UserError where a scorer or the fit refuses its input.
    """
    recipe = learner.recipe
    prompts = _mixed(learner.prompts[learner.prompts["split"] == "dual"], recipe)
    pool, timing, size = _play(learner, prompts)
    in_std = {c.name: c.margins_in_std for c in recipe.objective.constraints if c.margins_in_std}
    stds = reference_stds(pool, list(in_std))
    problem, warnings = _seen(recipe.with_reference_stds(stds).problem, pool)
    points = first_tail_points(pool, problem, recipe.dual.max_lambda)
    problem = problem.with_tail_points(points)
    concerned = problem.prompt_counts(learner.prompts)
    splits = learner.prompts["split"]
    counts = {split: int((splits == split).sum()) for split in ("fit", "dual", "test")}
    precision = expected_precision(
        pool,
        problem,
        responses_per_prompt=recipe.dual.responses_per_prompt,
        prompts=concerned[["dual", "test"]],
        target_se=target_se,
    )
    pilot = Pilot(
        prompts=size.prompts,
        responses_per_prompt=responses_per_prompt(recipe),
        cut_off_fraction=float((~pool["ended"]).mean()),
        example=pool["response"].iloc[0],
        scores=score_statistics(pool, recipe.scorers),
        margins={
            name: (number, stds[utility])
            for utility, numbers in in_std.items()
            for name, number in numbers.items()
        },
        precision=precision,
        calibrations=learner.calibrations(pool),
        scale=score_scale(pool, problem, *initial_multipliers(recipe.dual.init, problem)),
        seconds=expected_seconds(learner, counts, timing, given_responses),
        peak_gib=_peak_gib(),
        bounded=size.bounded,
    )
    warnings += _out_of_reach(pool, problem, recipe.dual.max_lambda)
    return pilot, warnings + reachable_verdicts(recipe, problem, pool, precision)


def _mixed(prompts: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """The prompts in an order in which every category comes early."""
    for column in recipe.category_columns:
        first = prompts[column].map(lambda names: names[0] if len(names) else "")
        prompts = prompts.iloc[np.argsort(first.groupby(first).cumcount(), kind="stable")]
    return prompts


def _seen(problem: ConstrainedProblem, pool: pd.DataFrame) -> tuple[ConstrainedProblem, list[str]]:
    """The problem without the constraints that concern none of the pilot's prompts, and a line
    about them."""
    seen = tuple(c for c in problem.constraints if pool[c.column].notna().any())
    left = [c.name for c in problem.constraints if c not in seen]
    line = f"pilot: it had no prompt of {', '.join(left)}; nothing is said of them"
    return replace(problem, constraints=seen), [line] * bool(left)


def _play(learner: LoraLearner, prompts: pd.DataFrame) -> tuple[pd.DataFrame, Timing, PilotSize]:
    """Samples and scores π_ref, fits a few steps, samples the adapter; π_ref's scored responses,
    the times, and how much was played."""
    seed = derive_seed(learner.recipe.seed, 0, "pilot")
    pool, seconds, per_prompt = pd.DataFrame(), {}, responses_per_prompt(learner.recipe)
    size = PilotSize(0, 0, 0, False)

    def draw(chosen: pd.DataFrame, adapter: Path | None) -> tuple[pd.DataFrame, float]:
        start = time.perf_counter()
        drawn = learner.sample(
            chosen, responses_per_prompt=per_prompt, adapter=adapter, source="pilot", seed=seed
        )
        taken = time.perf_counter() - start
        require_policy_draws(drawn, draw_rule(learner.recipe), "pilot")
        return drawn, taken / len(drawn)

    def sample_reference() -> None:
        nonlocal pool, size
        draw(prompts.head(1), None)  # the first call pays for what later ones do not
        _, measured = draw(prompts.head(1), None)
        size = pilot_size(learner.recipe, len(prompts), measured)
        drawn, seconds["sample"] = draw(prompts.head(size.prompts), None)
        begun = time.perf_counter()
        pool = learner.score(drawn)
        seconds["score"] = (time.perf_counter() - begun) / len(pool)

    def fit_and_sample(folder: Path) -> None:
        seconds["step"], seconds["around"] = _time_fit(learner, pool, folder, size.rows)
        again = prompts.head(size.adapter_prompts)
        _, seconds["resample"] = draw(again, folder / "adapter")

    with tempfile.TemporaryDirectory() as folder:
        timed("pilot: sample and score π_ref", sample_reference)
        phase = "pilot: fit a few steps, sample the adapter"
        timed(phase, lambda: fit_and_sample(Path(folder)))
        if learner.servers is not None:
            _again_without_adapter(learner, prompts, per_prompt)
    sampled, again = (seconds[key] + seconds["score"] for key in ("sample", "resample"))
    return pool, Timing(sampled, again, seconds["step"], seconds["around"]), size


def _again_without_adapter(learner: LoraLearner, prompts: pd.DataFrame, per_prompt: int) -> None:
    """Draw from π_ref once more on servers that have had an adapter: some go on answering with it.
    Raises UserError where they do."""
    drawn = learner.sample(
        prompts,
        responses_per_prompt=per_prompt,
        adapter=None,
        source="pilot",
        seed=derive_seed(learner.recipe.seed, 0, "pilot", 1),
    )
    require_policy_draws(drawn, draw_rule(learner.recipe), "pilot, π_ref after an adapter")


def _peak_gib() -> float:
    """The peak of this process so far: of tensors on the GPU where there is one, else of resident
    memory with the libraries."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _out_of_reach(pool: pd.DataFrame, problem: ConstrainedProblem, max_lambda: float) -> list[str]:
    """A line per constraint that no tilt of the pilot's samples reaches with λ up to max_lambda
    (score units)."""
    table = ScoreTable.from_frame(pool, problem)
    solution = solve_one_shot(table, problem, max_lambda=max_lambda)
    levels = table.levels(problem)
    return [
        f"{name}: no tilt of the pilot's samples of π_ref reaches its level {levels[name]:.3g}, "
        "the best reaches "
        f"{solution.utilities[name]:.3g}; lower its margin or threshold, or look at the samples"
        for name in solution.at_bound
    ]


def _time_fit(
    learner: LoraLearner, pool: pd.DataFrame, folder: Path, in_step: int
) -> tuple[float, float]:
    """(seconds per optimizer step, seconds around them) of a fit in the recipe's batches; its
    adapter is in `folder`. in_step: rows of a step that is timed; more cost in proportion."""
    from constrained_dpo.fit.adapter import fit_adapter
    from constrained_dpo.fit.trainer import FitPlan

    recipe = learner.recipe
    reward, rows = recipe.problem.reward, TIMED_STEPS * in_step
    law, family = _family(recipe)
    if recipe.fit.grouped:
        per_prompt = math.ceil(rows / pool["prompt_id"].nunique())
        labels = label_groups(
            pool,
            reward,
            law,
            group_size=recipe.fit.group_size,
            groups_per_prompt=per_prompt,
            seed=0,
        )
    else:
        kind = "soft" if recipe.fit.labels == "given" else recipe.fit.labels
        labels = label_pairs(pool, reward, law, labels=kind, pairs_per_prompt=None, seed=0)
        labels = labels.iloc[np.resize(np.arange(len(labels)), rows)]
    # Every forward costs the same, so one per step is timed and multiplied.
    changed = {"epochs": None, "gradient_accumulation": 1, "batch_size": in_step}
    unused: dict[str, Any] = {"holdout": 0.0, "early_stop": None, "report_to": [], "refresh": 1}
    settings = recipe.fit.model_copy(update=changed | unused)
    for name, steps in (("warmup", 1), ("fitted", TIMED_STEPS)):
        start = time.perf_counter()
        plan = FitPlan(
            settings.model_copy(update={"steps": steps}),
            recipe.policy.lora,
            recipe.objective.beta,
            seed=0,
            output=folder / name,
            family=family,
        )
        fit_adapter(learner.policy, labels, pool, learner.prompt_tokens, plan)
        total = time.perf_counter() - start
    log = json.loads((folder / "fitted" / "training_log.json").read_text())["log"]
    if family is None:
        (folder / "fitted").rename(folder / "adapter")
    else:
        ones = np.ones(family.num_blocks)
        write_adapter(
            folder / "fitted", scaled_weights(folder / "fitted", ones), folder / "adapter"
        )
    trained = next(row["train_runtime"] for row in log if "train_runtime" in row)
    forwards = recipe.fit.gradient_accumulation * recipe.fit.batch_size / in_step
    return trained / TIMED_STEPS * forwards, total - trained


def _family(recipe: Recipe) -> tuple[pd.Series | MultiplierRange, Family | None]:
    """What the pilot's rows are labelled under, and the family that it fits: one of the recipe's
    shape, about λ = 1, since only its cost is measured."""
    names, conditional = recipe.problem.names, recipe.fit.conditional
    if conditional is None:
        return pd.Series(0.0, index=names), None
    ones = pd.Series(1.0, index=names)
    law = MultiplierRange(ones, 0.1 * ones, recipe.trained_range, conditional.kappa)
    return law, family_for(recipe.problem.constraints, ones, law, recipe.policy.lora.r)
