"""The scale of the scores: what β is beside their spread within a prompt, and how many pairs are
saturated."""

import math
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from constrained_dpo.problem import ConstrainedProblem, by_name
from data_prep.labels.lagrangian import lagrangian_score
from data_prep.records import Record

SATURATED = math.log(99)
"""|s_i − s_j| from which the larger score is preferred with probability 0.99 (score units)."""

TIED = math.log(0.6 / 0.4)
"""|s_i − s_j| below which the probability is between 0.4 and 0.6 (score units)."""


LARGE_SHARE = 0.3
"""Share of saturated pairs from which the scale of the scores is lost."""


class ScoreScale(Record):
    """The scale of s_λ = r + λ·g.

    lambda_is: what the multipliers are, in words. std_within: square root of the mean variance
    within a prompt (score units); beta_over_std: β / std_within, None where that is 0; saturated,
    tied: share of all pairs of a prompt's responses with P = σ(|s_i − s_j|) > 0.99, < 0.6
    (arXiv:2505.19387, §3, for P).
    """

    lambda_: dict[str, float] = Field(alias="lambda")
    lambda_is: str
    std_within: float
    beta_over_std: float | None
    saturated: float
    tied: float


def score_scale(
    responses: pd.DataFrame, problem: ConstrainedProblem, lambda_: pd.Series, lambda_is: str
) -> ScoreScale:
    """Measure the scale of s_λ over responses of at least two to a prompt."""
    score = lagrangian_score(problem.scores(responses), problem.reward, lambda_)
    by_prompt = pd.Series(np.asarray(score)).groupby(responses["prompt_id"].to_numpy())
    variances, pairs, saturated, tied = [], 0, 0, 0
    for _, values in by_prompt:
        ordered, above = np.sort(values.to_numpy()), np.arange(len(values))
        if len(ordered) < 2:
            continue
        variances.append(ordered.var(ddof=1))
        pairs += len(ordered) * (len(ordered) - 1) // 2
        # scores below by more than that
        saturated += int(np.searchsorted(ordered, ordered - SATURATED, side="left").sum())
        tied += int((above - np.searchsorted(ordered, ordered - TIED, side="right")).sum())
    std = math.sqrt(np.mean(variances)) if variances else 0.0
    return ScoreScale(
        lambda_=by_name(lambda_),
        lambda_is=lambda_is,
        std_within=std,
        beta_over_std=problem.beta / std if std else None,
        saturated=saturated / pairs if pairs else 0.0,
        tied=tied / pairs if pairs else 1.0,
    )


def loss_by_scale(grouped: bool, scale: ScoreScale) -> Literal["logistic", "listwise"]:
    """Choose the loss (`fit.loss: auto`): listwise where rows are groups and more than LARGE_SHARE
    of all pairs saturate."""
    return "listwise" if grouped and scale.saturated > LARGE_SHARE else "logistic"


def initial_multipliers(
    init: str | dict[str, float], problem: ConstrainedProblem
) -> tuple[pd.Series, str]:
    """Give λ_0 as far as `dual.init` says it before anything was sampled, and what it is, in
    words."""
    values = init if isinstance(init, dict) else {}
    lambda_ = pd.Series({name: values.get(name, 0.0) for name in problem.names}, dtype=float)
    if isinstance(init, dict) or init == "zeros":
        return lambda_, "dual.init"
    return lambda_, f"λ = 0: dual.init {init} is not known before `prepare`"
