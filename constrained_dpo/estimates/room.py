"""How much room u needs on the dual prompts, so that a verdict on the test prompts comes out."""

import numpy as np
import pandas as pd
from scipy import stats

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.slack import Bounds, prompt_slack
from constrained_dpo.problem import ConstrainedProblem

POWER = 0.9
"""How often a policy with this much room is to be called satisfied."""


def test_room(
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
    bound on the test prompts, `test_prompts` with `responses` responses each. The bound lies a
    width below u there, and u itself differs from the dual prompts' by the noise of both sets:
    room = width + z · std · √(1/N_test + 1/N_dual), std of a prompt's slack with that many
    responses. The width is this sample's own, scaled by std/√N.
    """
    slack = prompt_slack(samples, reference, problem)
    per_prompt = samples.groupby("prompt_id", sort=True)[problem.names]
    noise = per_prompt.var(ddof=1).mean().fillna(0.0)
    count = per_prompt.size().mean()
    rooms = {}
    for name in problem.names:
        values, ends = slack[name].to_numpy(np.float64), bounds[name]
        ends = (min(ends[0], values.min()), max(ends[1], values.max()))
        variance = values.var(ddof=1)
        # the same prompts with another number of responses
        there = max(variance + noise[name] * (1 / responses - 1 / count), 0.05 * variance)
        width = values.mean() - mean_interval(values, 2 * confidence - 1, ends)[0]
        scale = np.sqrt(there / variance * len(values) / test_prompts) if variance > 0 else 1.0
        spread = np.sqrt(there * (1 / test_prompts + 1 / len(values)))
        rooms[name] = float(width * scale + stats.norm.ppf(POWER) * spread)
    return rooms
