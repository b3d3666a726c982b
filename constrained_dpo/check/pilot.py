"""A small pilot before a run: how precise u will be, how many prompts a precision needs, and how
long each phase will take.

A few dual prompts are answered by π_ref, scored, and fitted for a few steps by the real trainer;
everything is thrown away afterwards.
"""

import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.check.score_scale import describe_scale, initial_multipliers, score_scale
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.progress import Announce, silent
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.scorer_facts import reference_stds, score_statistics
from data_prep.labels.preferences import label_groups, label_pairs
from data_prep.settings import derive_seed

MIN_PROMPTS, MAX_PROMPTS, MAX_RESPONSES = 16, 64, 8


TIMED_STEPS = 2


def variance_components(scored: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Columns `mean, within, between, spread` by objective, from the same number K ≥ 2 of responses
    for each of n ≥ 2 prompts.

    mean: score units; within, between: score variance within a prompt and between prompts (score
    units²), by one-way analysis of variance: within is the mean of the prompts' sample variances
    s_x², between = max(0, variance of prompt means − within/K). spread: squared coefficient of
    variation of the variance within a prompt, over prompts. A normal sample's s_x² has itself a
    squared coefficient of 2/(K−1), so spread = max(0, (Var_x(s_x²)/within² − 2/(K−1)) / (1 +
    2/(K−1))).
    """
    groups = scored.groupby("prompt_id")[names]
    per_prompt = groups.size().iloc[0]
    variances, means = groups.var(ddof=1), groups.mean()
    within, noise = variances.mean(), 2 / (per_prompt - 1)
    between = (means.var(ddof=1) - within / per_prompt).clip(lower=0.0)
    spread = (
        (variances.var(ddof=1) / (within**2).where(within > 0, np.inf) - noise) / (1 + noise)
    ).clip(lower=0.0)
    return pd.DataFrame(
        {"mean": means.mean(), "within": within, "between": between, "spread": spread}, index=names
    )


def prompt_variance(
    components: pd.DataFrame, problem: ConstrainedProblem, responses_per_prompt: int
) -> pd.Series:
    """Expected variance of one prompt's contribution to u, by constraint (score units²); the
    standard error of u over n prompts is its square root over √n.

    margin b:     2 σ_w²/K + τ²,          τ = |b| c,                the paired difference of two
    means of K responses to one prompt threshold a:  σ_w²/K + σ_b² + τ²,     τ = max(a − ḡ_ref, 0)
    c,  one mean

    σ_w², σ_b²: variance within and between prompts; c: coefficient of variation over prompts of the
    variance within a prompt; all of π_ref. Assumed, since π_θ does not exist yet: it varies within
    prompts as π_ref does; it gains what the constraint asks for; and its gain at a prompt is
    proportional to the variance there, which is the first-order effect of λ under the tilt exp(λ
    g/β): λ Var(g|x)/β. A policy that overshoots, or gains unevenly for other reasons, has a larger
    error.
    """
    variance = {}
    for c in problem.constraints:
        mean, within, between, spread = components.loc[
            c.name, ["mean", "within", "between", "spread"]
        ]
        sampling = within / responses_per_prompt
        if c.margin is not None:
            variance[c.name] = 2 * sampling + spread * c.margin**2
        else:
            variance[c.name] = sampling + between + spread * max(c.threshold - mean, 0.0) ** 2
    return pd.Series(variance, index=problem.names, dtype=float)


def expected_precision(
    scored: pd.DataFrame,
    problem: ConstrainedProblem,
    *,
    responses_per_prompt: int,
    prompts: dict[str, int],
    target_se: dict[str, float],
) -> dict[str, dict[str, object]]:
    """By constraint: score standard deviation within and between prompts, expected standard error
    of u by split, and the number of prompts that the target needs (margin/10 unless `target_se`
    names another; null for a threshold or a margin of 0 without one).

    prompts: number by split (dual, test). Score units throughout.
    """
    components = variance_components(scored, problem.names)
    variance = prompt_variance(components, problem, responses_per_prompt)
    precision = {}
    for c in problem.constraints:
        target = target_se.get(c.name, abs(c.margin) / 10 if c.margin else None)
        precision[c.name] = {
            "std_within": math.sqrt(components.loc[c.name, "within"]),
            "std_between": math.sqrt(components.loc[c.name, "between"]),
            "se": {split: math.sqrt(variance[c.name] / count) for split, count in prompts.items()},
            "target_se": target,
            "prompts_needed": math.ceil(variance[c.name] / target**2) if target else None,
        }
    return precision


def run_pilot(
    learner: LoraLearner,
    target_se: dict[str, float],
    announce: Announce = silent,
    given_responses: int = 0,
) -> dict[str, object]:
    """`precision` of u, `scores` and their `scale`, `margins` in std as the pilot's samples resolve
    them, `calibrations` of implicit scorers, expected `seconds` by phase, and what the pilot was
    (`prompts`, `responses_per_prompt`, `cut_off_fraction`).

    given_responses: how many responses of the dataset the pool will hold. The learner's run is not
    written to. Raises UserError where a scorer or the fit refuses its input.
    """
    recipe = learner.recipe
    prompts = learner.prompts[learner.prompts["split"] == "dual"]
    per_prompt = max(min(recipe.dual.responses_per_prompt, MAX_RESPONSES), recipe.fit.group_size)
    prompts = prompts.head(
        int(np.clip(recipe.sampling.batch_size // per_prompt, MIN_PROMPTS, MAX_PROMPTS))
    )
    seed = derive_seed(recipe.seed, 0, "pilot")

    def draw(chosen: pd.DataFrame, adapter: Path | None) -> tuple[pd.DataFrame, float]:
        start = time.perf_counter()
        drawn = learner.sample(
            chosen, responses_per_prompt=per_prompt, adapter=adapter, source="pilot", seed=seed
        )
        return drawn, (time.perf_counter() - start) / len(drawn)

    with tempfile.TemporaryDirectory() as folder:
        announce("pilot: sample and score π_ref", None)
        start = time.perf_counter()
        draw(prompts.head(2), None)  # the first call pays for what later ones do not
        drawn, sampling = draw(prompts, None)
        begun = time.perf_counter()
        pool = learner.score(drawn)
        scoring = (time.perf_counter() - begun) / len(pool)
        announce("pilot: sample and score π_ref", time.perf_counter() - start)
        announce("pilot: fit a few steps, sample the adapter", None)
        start = time.perf_counter()
        step, overhead = _time_fit(learner, pool, Path(folder))
        _, resampling = draw(prompts, Path(folder) / "adapter")
        announce("pilot: fit a few steps, sample the adapter", time.perf_counter() - start)
    unresolved = recipe.problem.unresolved
    stds = reference_stds(pool, list(unresolved))
    problem = recipe.problem.resolved(stds)
    scale = score_scale(pool, problem, *initial_multipliers(recipe.dual.init, problem))
    counts = {
        split: int((learner.prompts["split"] == split).sum()) for split in ("fit", "dual", "test")
    }
    return {
        "prompts": len(prompts),
        "responses_per_prompt": per_prompt,
        "cut_off_fraction": float((~pool["ended"]).mean()),
        "example": pool["response"].iloc[0],
        "warnings": _out_of_reach(pool, problem, recipe.dual.max_lambda),
        "scores": score_statistics(pool, recipe.scorers),
        "margins": {name: (number, stds[name]) for name, number in unresolved.items()},
        "precision": expected_precision(
            pool,
            problem,
            responses_per_prompt=recipe.dual.responses_per_prompt,
            prompts={split: counts[split] for split in ("dual", "test")},
            target_se=target_se,
        ),
        "calibrations": learner.calibrations(pool),
        "scale": scale | {"words": describe_scale(scale, recipe.objective.beta, recipe.fit)},
        "seconds": _expected_seconds(
            learner,
            counts,
            sampling + scoring,
            resampling + scoring,
            step,
            overhead,
            given_responses,
        ),
    }


def _out_of_reach(pool: pd.DataFrame, problem: ConstrainedProblem, max_lambda: float) -> list[str]:
    """A line per constraint that no tilt of the pilot's samples reaches with λ up to max_lambda
    (score units)."""
    table = ScoreTable.from_frame(pool, problem)
    solution = solve_one_shot(table, problem, max_lambda=max_lambda)
    levels = problem.levels(pd.Series(table.reference_means(), index=problem.names))
    return [
        f"{name}: no tilt of the pilot's samples of π_ref reaches its level {levels[name]:.3g}, "
        "the best reaches "
        f"{solution.utilities[name]:.3g}; lower its margin or threshold, or look at the samples"
        for name in solution.at_bound
    ]


def _time_fit(learner: LoraLearner, pool: pd.DataFrame, folder: Path) -> tuple[float, float]:
    """(seconds per optimizer step, seconds around them) of a fit in the recipe's batches; its
    adapter is in `folder`."""
    from constrained_dpo.fit.trainer import fit_adapter

    recipe = learner.recipe
    reward, zero, rows = (
        recipe.problem.reward,
        pd.Series(0.0, index=recipe.problem.names),
        TIMED_STEPS * recipe.fit.batch_size,
    )
    if recipe.fit.grouped:
        per_prompt = math.ceil(rows / pool["prompt_id"].nunique())
        labels = label_groups(
            pool,
            reward,
            zero,
            group_size=recipe.fit.group_size,
            groups_per_prompt=per_prompt,
            seed=0,
        )
    else:
        labels = label_pairs(
            pool, reward, zero, labels=recipe.fit.labels, pairs_per_prompt=None, seed=0
        )
        labels = labels.iloc[np.resize(np.arange(len(labels)), rows)]
    # Every forward costs the same, so one per step is timed and multiplied.
    alone = {"holdout": 0.0, "early_stop": None, "report_to": []}
    settings = recipe.fit.model_copy(update={"epochs": None, "gradient_accumulation": 1, **alone})
    for name, steps in (("warmup", 1), ("adapter", TIMED_STEPS)):
        start = time.perf_counter()
        fit_adapter(
            learner.policy,
            labels,
            pool,
            learner.prompt_tokens,
            settings.model_copy(update={"steps": steps}),
            recipe.policy.lora,
            beta=recipe.objective.beta,
            seed=0,
            previous_adapter=None,
            output=folder / name,
        )
        total = time.perf_counter() - start
    log = json.loads((folder / "adapter" / "training_log.json").read_text())["log"]
    trained = next(row["train_runtime"] for row in log if "train_runtime" in row)
    return trained / TIMED_STEPS * recipe.fit.gradient_accumulation, total - trained


def _expected_seconds(
    learner: LoraLearner,
    counts: dict[str, int],
    per_reference: float,
    per_response: float,
    step: float,
    overhead: float,
    given_responses: int,
) -> dict[str, float]:
    """Seconds of prepare, fit and rescore (one round), and the whole run, from seconds per response
    and per step.

    A response of the dataset counts as one that is drawn, so what it costs is over-stated. The pool
    of round 0 sets the number of steps where the recipe gives epochs; a growing pool with
    pairs_per_prompt: all makes it larger.
    """
    recipe = learner.recipe
    to_fit, measured = counts["fit"] + counts["dual"], recipe.dual.responses_per_prompt
    drawn = (
        0 if recipe.pool.source == "dataset" else recipe.sampling.responses_per_prompt
    ) + given_responses / to_fit
    remeasured = (counts["dual"] + counts["test"]) * measured
    steps = recipe.fit.steps
    if steps is None:
        all_pairs = max(drawn * (drawn - 1) / 2, 0)
        wanted = (
            all_pairs
            if recipe.fit.pairs_per_prompt == "all"
            else min(recipe.fit.pairs_per_prompt, all_pairs)
        )
        rows = to_fit * (recipe.fit.groups_per_prompt if recipe.fit.grouped else wanted)
        steps = math.ceil(
            recipe.fit.epochs * rows / (recipe.fit.batch_size * recipe.fit.gradient_accumulation)
        )
    prepare = (to_fit * drawn + remeasured) * per_reference
    fit, rescore = steps * step + overhead, remeasured * per_response
    fits = sum(
        _share(recipe, number) * steps * step + overhead for number in range(recipe.dual.rounds)
    )
    return {
        "prepare": prepare,
        "fit": fit,
        "rescore": rescore,
        "run": prepare + fits + recipe.dual.rounds * rescore,
    }


def _share(recipe: Recipe, number: int) -> float:
    """A round's steps or epochs in shares of the first round's."""
    first, this = recipe.fit, recipe.fit.in_round(number)
    return this.steps / first.steps if first.steps is not None else this.epochs / first.epochs
