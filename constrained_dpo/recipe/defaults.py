"""Numbers that a recipe leaves to the toolkit, from how many prompts there are.

They are functions of the prompts alone, so a run that goes on finds the same ones. What they aim
at was measured on enumerable worlds (docs/benchmarks.md): about 12,000 fresh responses a round,
whoever answers them, and one pass over 3,200 groups in a first fit.
"""

from collections.abc import Mapping

import pandas as pd

from constrained_dpo.recipe.schema import Recipe

FRESH_RESPONSES, POOL_RESPONSES, MIN_STEPS = 12_000, 3_000, 200


def split_counts(prompts: pd.DataFrame) -> dict[str, int]:
    """Count a prompts table's rows by split."""
    return {str(split): int(count) for split, count in prompts["split"].value_counts().items()}


def sized(recipe: Recipe, prompts: Mapping[str, int]) -> Recipe:
    """Fill in what the recipe leaves open.

    prompts: how many there are, by split (fit, dual, test).
    """
    fit, dual, sampling = recipe.fit, recipe.dual, recipe.sampling
    to_fit = max(1, prompts.get("fit", 0) + prompts.get("dual", 0))
    row = fit.group_size
    if not sampling.responses_per_prompt:
        count = min(64, max(8, row, round(POOL_RESPONSES / to_fit)))
        sampling = sampling.model_copy(update={"responses_per_prompt": count})
    if not dual.responses_per_prompt:
        count = min(256, max(8, round(FRESH_RESPONSES / max(1, prompts.get("dual", 0)))))
        dual = dual.model_copy(update={"responses_per_prompt": count})
    if not dual.reference_responses:
        count = dual.responses_per_prompt * (2 if dual.method == "solve" else 1)
        dual = dual.model_copy(update={"reference_responses": count})
    rows = fit.batch_size * fit.gradient_accumulation
    if fit.steps is None and fit.epochs is None:
        fit = fit.model_copy(update={"steps": max(MIN_STEPS, -(-to_fit // rows))})
    if not fit.groups_per_prompt:
        count = 4 if fit.steps is None else -(-fit.steps * rows // to_fit)
        fit = fit.model_copy(update={"groups_per_prompt": count})
    if fit.warmup_steps is None:
        fit = fit.model_copy(update={"warmup_steps": 0 if fit.steps is None else fit.steps // 20})
    return recipe.model_copy(update={"fit": fit, "dual": dual, "sampling": sampling})


def choices(recipe: Recipe, open_: Recipe, loss: str | None) -> list[str]:
    """Say in words what the toolkit chose where the recipe leaves it open, and why.

    recipe: sized; open_: as the user wrote it; loss: what `auto` comes to, None where that is not
    known yet.
    """
    lines, fit = [], recipe.fit
    if not open_.sampling.responses_per_prompt:
        count = recipe.sampling.responses_per_prompt
        lines.append(f"{count} responses of π_ref per fit prompt: about {POOL_RESPONSES} in all")
    if not open_.dual.responses_per_prompt:
        count = recipe.dual.responses_per_prompt
        lines.append(
            f"{count} responses per dual or test prompt: about {FRESH_RESPONSES} a round, which is "
            "what keeps u's noise and the fit's drift small"
        )
    if not open_.dual.reference_responses and recipe.dual.method == "solve":
        lines.append(
            f"{recipe.dual.reference_responses} responses of π_ref per dual or test prompt: the "
            "noise of its mean is in u at every λ"
        )
    if open_.fit.steps is None and open_.fit.epochs is None:
        rows = fit.batch_size * fit.gradient_accumulation
        lines.append(f"{fit.steps} steps of {rows} rows a round: enough for a row of each prompt")
    if not open_.fit.groups_per_prompt and fit.grouped:
        lines.append(f"{fit.groups_per_prompt} groups per prompt and round: what the steps read")
    if fit.loss == "auto" and loss is not None:
        share = "most" if loss == "listwise" else "few"
        lines.append(f"loss {loss}: {share} pairs saturate at this scale of the scores")
    if fit.conditional is not None:
        lines.append(
            f"one policy for every λ within a factor {recipe.trained_range:g}, {recipe.stretches} "
            f"stretches a fit, LoRA+ ratio {fit.loraplus_ratio:g}: nearest to the optimum in "
            "docs/benchmarks.md"
        )
    return lines
