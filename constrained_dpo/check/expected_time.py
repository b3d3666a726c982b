"""How long a run will take, from what a pilot measured."""

import math
from dataclasses import dataclass

from constrained_dpo.fit.contexts import SEQUENCES
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.family import trial_responses


@dataclass(frozen=True)
class Timing:
    """Seconds per sampled and scored response of π_ref and of an adapter, per optimizer step, and
    around a fit's steps."""

    reference_response: float
    response: float
    step: float
    around_fit: float


def expected_seconds(
    learner: LoraLearner, counts: dict[str, int], timing: Timing, given_responses: int
) -> dict[str, float]:
    """Seconds of prepare, fit and rescore (one round; refresh, distillations and all trials in the
    latter), and of the whole run.

    A response of the dataset counts as one that is drawn, so what it costs is over-stated. The pool
    of round 0 sets the number of steps where the recipe gives epochs; a growing pool with
    pairs_per_prompt: all makes it larger.
    """
    recipe = learner.recipe
    to_fit, measured = counts["fit"] + counts["dual"], recipe.dual.responses_per_prompt
    drawn = 0 if recipe.pool.source == "dataset" else recipe.sampling.responses_per_prompt
    responses = drawn + given_responses / to_fit
    remeasured = (counts["dual"] + counts["test"]) * measured
    fit_steps = _steps(recipe, to_fit, responses) * timing.step
    prepare = (to_fit * responses + remeasured) * timing.reference_response
    rescore = (remeasured + counts["dual"] * _further_responses(recipe)) * timing.response
    shares = [_share(recipe, number) for number in range(recipe.dual.rounds)]
    rescore += _distillations(recipe) * timing.step
    fits = sum(share * fit_steps + timing.around_fit for share in shares)
    return {
        "prepare": prepare,
        "fit": fit_steps + timing.around_fit,
        "rescore": rescore,
        "run": prepare + fits + recipe.dual.rounds * rescore,
    }


def _further_responses(recipe: Recipe) -> int:
    """Responses per dual prompt that a round draws beside its own sample: between the stretches of
    its fit, and at most so many in trials."""
    fit, measured = recipe.fit, recipe.dual.responses_per_prompt
    within = (recipe.stretches - 1) * max(1, measured // recipe.stretches)
    trials = 0 if fit.conditional is None else recipe.dual.trials * trial_responses(recipe)
    return within + trials


def _distillations(recipe: Recipe) -> float:
    """Steps of a round that make adapters of members whose λ differs by category: for each trial
    and each sample within the fit. A step of a fit lacks the teacher's forward, a third."""
    conditional = recipe.fit.conditional
    if conditional is None or all(c.by is None for c in recipe.objective.constraints):
        return 0.0
    fit, members = recipe.fit, recipe.dual.trials + recipe.stretches
    in_step = fit.batch_size * fit.gradient_accumulation * (fit.group_size if fit.grouped else 2)
    return 4 / 3 * SEQUENCES / in_step * conditional.distill_steps * members


def _steps(recipe: Recipe, num_prompts: int, responses: float) -> int:
    """Optimizer steps of the first fit."""
    fit = recipe.fit
    if fit.steps is not None:
        return fit.steps
    pairs = max(responses * (responses - 1) / 2, 0)
    if fit.pairs_per_prompt != "all":
        pairs = min(fit.pairs_per_prompt, pairs)
    rows = num_prompts * (fit.groups_per_prompt if fit.grouped else pairs)
    return math.ceil((fit.epochs or 0) * rows / (fit.batch_size * fit.gradient_accumulation))


def _share(recipe: Recipe, number: int) -> float:
    """A round's steps or epochs in shares of the first round's."""
    first, this = recipe.fit, recipe.fit.in_round(number)
    if first.steps is not None and this.steps is not None:
        return this.steps / first.steps
    return (this.epochs or 0) / (first.epochs or 1)
