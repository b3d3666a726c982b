"""How much room u needs on the dual prompts, so that a verdict on the test prompts comes out."""

import numpy as np
import pandas as pd
from scipy import stats

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.slack import Bounds, prompt_slack
from constrained_dpo.problem import ConstrainedProblem

POWER = 0.9
"""How often a policy with this much room is to be called satisfied."""

LEVELS = 3
"""The room depends on how far the worst case lies below it, and so on itself: a few repetitions."""


def required_room(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    *,
    bounds: Bounds,
    confidence: float,
    test_prompts: int,
    responses: int,
) -> dict[str, float]:
    """Estimate the slack with which the test prompts say *satisfied* in 9 of 10 draws, by
    constraint (score units).

    samples, reference: of a policy and of π_ref on the dual prompts; confidence: of the one-sided
    bound on the test prompts, `test_prompts` with `responses` responses each, of which a constraint
    concerns the share that it does here. The bound lies a
    width below u there, and u itself differs from the dual prompts' by the noise of both sets:
    room = width + z · std · √(1/N_test + 1/N_dual), std of a prompt's slack with that many
    responses. The width is that of so many values with this std, of this sample's shape and around
    the room itself, within the bounds.
    """
    slack = prompt_slack(samples, reference, problem)
    per_prompt = problem.scores(samples).groupby("prompt_id", sort=True)[problem.names]
    noise = per_prompt.var(ddof=1).mean().fillna(0.0)
    count = per_prompt.size().mean()
    rooms = {}
    for name in problem.names:
        values = slack[name].dropna().to_numpy(np.float64)
        prompts = max(2, round(test_prompts * len(values) / len(slack)))
        variance = values.var(ddof=1)
        # the same prompts with another number of responses
        there = max(variance + noise[name] * (1 / responses - 1 / count), 0.05 * variance)
        spread = float(np.sqrt(there * (1 / prompts + 1 / len(values))))
        shape = _resized(values, prompts, np.sqrt(there))
        room = 0.0
        for _ in range(LEVELS):
            width = _width(shape + room, confidence, bounds[name])
            room = width + float(stats.norm.ppf(POWER)) * spread
        rooms[name] = room
    return rooms


def _resized(values: np.ndarray, count: int, std: float) -> np.ndarray:
    """Quantiles of a sample, as many as `count`, with mean 0 and this standard deviation."""
    quantiles = np.quantile(values, (np.arange(count) + 0.5) / count)
    centred = quantiles - quantiles.mean()
    size = centred.std(ddof=1) if count > 1 else 0.0
    return centred * (std / size) if size > 0 else np.zeros(count)


def _width(values: np.ndarray, confidence: float, ends: tuple[float, float]) -> float:
    """How far the one-sided lower bound lies below the mean."""
    within = min(ends[0], values.min()), max(ends[1], values.max())
    return float(values.mean() - mean_interval(values, 2 * confidence - 1, within)[0])
