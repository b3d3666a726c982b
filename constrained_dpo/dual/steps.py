"""How λ moves from round to round: the projected subgradient step. numpy and pandas only.

It acts on v, the slack that is steered on: u, or its lower confidence bound. v > 0 is satisfied
with room, so λ falls.
"""

import numpy as np
import pandas as pd

from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem
from data_prep.errors import UserError


def auto_step_scale(table: ScoreTable, problem: ConstrainedProblem) -> pd.Series:
    """Give std(r)/var(g) within prompts on reference samples, by constraint: the unit (reward units
    per utility unit²) of a step that means the same for every scorer.

    λ moves u by Var(g)/β within prompts; what differs between prompts does not answer it. Raises
    UserError where a utility does not vary within any prompt.
    """
    variance = table.within_spread() ** 2
    for name, value in zip(problem.names, variance, strict=True):
        if value <= 0:
            raise UserError(
                f"utility {name} is the same for all reference responses to a prompt, so no step "
                "moves it; check its scorer, or sample more responses per prompt"
            )
    unit = table.within_std(table.reward) / variance
    return pd.Series(unit, index=problem.names, dtype=float)


def step_size_at(step_size: float, schedule: str, round_number: int) -> float:
    """η_t: constant, or step_size/√(t+1) (the step of CAID's convergence theorem)."""
    return step_size / np.sqrt(round_number + 1) if schedule == "inverse_sqrt" else step_size


def dual_step(
    lambda_: pd.Series, u: pd.Series, step: pd.Series | float, max_lambda: float
) -> pd.Series:
    """Projected subgradient step λ ← clip(λ − η u, 0, max_lambda), by constraint (CAID,
    arXiv:2505.19387, Algorithm 1)."""
    return (lambda_ - step * u.reindex(lambda_.index)).clip(0.0, max_lambda)
