"""The scale of the scores: what β is beside their spread within a prompt, how many pairs are
saturated, and what may be done about it."""

import math

import numpy as np
import pandas as pd

from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.fit import FitSettings
from data_prep.labels.lagrangian import lagrangian_score

SATURATED = math.log(
    99
)  # |s_i − s_j| from which the larger score is preferred with probability 0.99, score units


TIED = math.log(0.6 / 0.4)  # below which the probability is between 0.4 and 0.6


LARGE_SHARE, NEARLY_ALL = 0.3, 0.9


def score_scale(
    responses: pd.DataFrame, problem: ConstrainedProblem, lambda_: pd.Series, known_as: str
) -> dict[str, object]:
    """The scale of s_λ = r + λ·g over responses of at least two to a prompt, JSON-ready.

    std_within: square root of the mean variance within a prompt (score units); beta_over_std: β /
    std_within, null where that is 0; saturated, tied: share of all pairs of a prompt's responses
    with P = σ(|s_i − s_j|) > 0.99, < 0.6 (arXiv:2505.19387, §3, for P); `lambda`: the multipliers,
    `lambda_is`: what they are, in words (`known_as`).
    """
    table = pd.DataFrame(
        {
            "prompt_id": responses["prompt_id"].to_numpy(),
            "score": lagrangian_score(responses, problem.reward, lambda_),
        }
    )
    variances, pairs, saturated, tied = [], 0, 0, 0
    for _, score in table.groupby("prompt_id")["score"]:
        ordered, above = np.sort(score.to_numpy()), np.arange(len(score))
        if len(ordered) < 2:
            continue
        variances.append(ordered.var(ddof=1))
        pairs += len(ordered) * (len(ordered) - 1) // 2
        saturated += int(
            np.searchsorted(ordered, ordered - SATURATED, side="left").sum()
        )  # scores below by more than that
        tied += int((above - np.searchsorted(ordered, ordered - TIED, side="right")).sum())
    std = math.sqrt(np.mean(variances)) if variances else 0.0
    return {
        "lambda": {name: float(value) for name, value in lambda_.items()},
        "lambda_is": known_as,
        "std_within": std,
        "beta_over_std": problem.beta / std if std else None,
        "saturated": saturated / pairs if pairs else 0.0,
        "tied": tied / pairs if pairs else 1.0,
    }


def initial_multipliers(
    init: str | dict[str, float], problem: ConstrainedProblem
) -> tuple[pd.Series, str]:
    """λ_0 as far as `dual.init` says it before anything was sampled, and what it is, in words."""
    known = isinstance(init, dict)
    lambda_ = pd.Series(
        {name: float(init.get(name, 0.0)) if known else 0.0 for name in problem.names}, dtype=float
    )
    if known or init == "zeros":
        return lambda_, "dual.init"
    return lambda_, f"λ = 0: dual.init {init} is not known before `prepare`"


def describe_scale(scale: dict[str, object], beta: float, fit: FitSettings) -> list[str]:
    """`score_scale` in words: the figures, and where they are unusual, what follows for the fit."""
    at = ", ".join(f"{name} {value:.3g}" for name, value in scale["lambda"].items())
    std, ratio = scale["std_within"], scale["beta_over_std"]
    where = scale["lambda_is"] + (f": {at}" if at and any(scale["lambda"].values()) else "")
    if ratio is None:
        return [
            f"scores (at {where}): all responses of a prompt score the same, so no pair says "
            "anything; look at the scorers"
        ]
    lines = [
        f"scores (at {where}): s = r + λ·g varies by {std:.3g} (std within a prompt), β/std "
        f"{ratio:.3g}; "
        f"{100 * scale['saturated']:.0f} % of pairs saturated (P > 0.99), "
        f"{100 * scale['tied']:.0f} % nearly tied (P < 0.6)"
    ]
    if scale["saturated"] > LARGE_SHARE and fit.loss != "listwise":
        lines.append(
            "  a saturated pair says which answer is better and hardly by how much. fit.loss: "
            "listwise with fit.group_size: 8 keeps the "
            "scale; with a higher learning rate and mostly recent samples "
            "(recipes/quickstart_std10.yaml) it came nearest to the optimum "
            "in docs/benchmarks.md. Or all scores, margins, thresholds and β divided by one number "
            f"(by {std:.2g}: std 1, β {beta / std:.2g}): the same problem with softer labels, "
            "which was not measured"
        )
    if scale["tied"] > NEARLY_ALL:
        drawn = "" if fit.labels in ("soft", "given") else f"; fit.labels is {fit.labels} here"
        lines.append(
            "  nearly every target is close to 1/2: a label that is drawn or rounded (fit.labels: "
            "bernoulli, argmax) would be mostly "
            f"noise, soft keeps the differences{drawn}"
        )
    return lines
