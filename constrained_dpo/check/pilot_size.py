"""How much of a recipe a pilot plays: what a minute holds."""

from dataclasses import dataclass

import numpy as np

from constrained_dpo.recipe.schema import Recipe

SECONDS = 60.0
"""What a pilot may take about, whatever the model: a third each for π_ref's responses, the fit, and
the adapter's responses."""

MIN_PROMPTS, MAX_PROMPTS, MAX_RESPONSES = 16, 64, 8

FEWEST_PROMPTS = 4
"""However slow the model is, the precision of u needs so many."""

TIMED_STEPS = 2

ADAPTER_COST, TRAINING_COST = 2.0, 1.0
"""Seconds of an adapter's response (π_ref reads it too), and of training on one, over those of a
response of π_ref; upper ends of what was seen."""


@dataclass(frozen=True)
class PilotSize:
    """prompts: answered by π_ref; adapter_prompts: of those, answered by the fitted adapter; rows:
    of a timed optimizer step; bounded: whether that is less than without a limit of time."""

    prompts: int
    adapter_prompts: int
    rows: int
    bounded: bool


def responses_per_prompt(recipe: Recipe) -> int:
    """Responses of a pilot's prompt: the recipe's, at most MAX_RESPONSES, and a row's at least."""
    return max(min(recipe.dual.responses_per_prompt, MAX_RESPONSES), recipe.fit.group_size)


def pilot_size(recipe: Recipe, available: int, seconds_per_response: float) -> PilotSize:
    """Say how much fits into SECONDS.

    available: dual prompts that there are; seconds_per_response: measured, of π_ref.
    """
    per_prompt = responses_per_prompt(recipe)
    share = SECONDS / 3 / seconds_per_response  # in responses of π_ref
    whole = int(np.clip(recipe.sampling.batch_size // per_prompt, MIN_PROMPTS, MAX_PROMPTS))
    whole = min(whole, available)
    least = min(FEWEST_PROMPTS, whole)
    prompts = int(np.clip(share / per_prompt, least, whole))
    again = int(np.clip(share / ADAPTER_COST / per_prompt, 1, prompts))
    in_row = recipe.fit.group_size if recipe.fit.grouped else 2
    steps = 1 + TIMED_STEPS  # one warms up
    rows = int(np.clip(share / TRAINING_COST / steps / in_row, 1, recipe.fit.batch_size))
    bounded = prompts < whole or again < whole or rows < recipe.fit.batch_size
    return PilotSize(prompts, again, rows, bounded)
