"""How precise u will be, from a few scored responses of π_ref."""

import math

import numpy as np
import pandas as pd

from constrained_dpo.problem import ConstrainedProblem
from data_prep.records import Record


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
    """Expect the variance of one prompt's contribution to u, by constraint (score units²); the
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
        mean, within, between, spread = (
            float(components[column][c.name]) for column in ("mean", "within", "between", "spread")
        )
        sampling = within / responses_per_prompt
        if c.margin is not None:
            variance[c.name] = 2 * sampling + spread * c.margin**2
        else:
            rise = max((c.threshold or 0.0) - mean, 0.0)
            variance[c.name] = sampling + between + spread * rise**2
    return pd.Series(variance, index=problem.names, dtype=float)


class Precision(Record):
    """A constraint's score standard deviation within and between prompts, the expected standard
    error of u by split, and the number of prompts that its target needs (score units)."""

    std_within: float
    std_between: float
    se: dict[str, float]
    target_se: float | None
    prompts_needed: int | None


def expected_precision(
    scored: pd.DataFrame,
    problem: ConstrainedProblem,
    *,
    responses_per_prompt: int,
    prompts: pd.DataFrame,
    target_se: dict[str, float],
) -> dict[str, Precision]:
    """Expect the precision of u, by constraint.

    prompts: numbers by constraint and split (dual, test); target_se: margin/10 where it names no
    other (None for a threshold or a margin of 0). Score units throughout.
    """
    components = variance_components(problem.scores(scored), problem.names)
    variance = prompt_variance(components, problem, responses_per_prompt)
    precision = {}
    for c in problem.constraints:
        target = target_se.get(c.name, abs(c.margin) / 10 if c.margin else None)
        precision[c.name] = Precision(
            std_within=math.sqrt(components["within"][c.name]),
            std_between=math.sqrt(components["between"][c.name]),
            se={
                str(split): math.sqrt(variance[c.name] / count)
                for split, count in prompts.loc[c.name].items()
            },
            target_se=target,
            prompts_needed=math.ceil(variance[c.name] / target**2) if target else None,
        )
    return precision
