"""What is estimated of a policy from its samples on one set of prompts."""

import pandas as pd

from constrained_dpo.estimates.kl import log_ratio
from constrained_dpo.estimates.slack import estimate_subgradient
from constrained_dpo.estimates.verdict import judge, one_sided_bounds
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.problem import ConstrainedProblem, by_name
from data_prep.records import Record


class Measurement(Record):
    """Estimates of a policy on one set of prompts; dicts are by constraint, score units.

    u: the slack; u_se, u_skew: its standard error, and the skewness of the prompts' slacks; u_ci_*:
    its two-sided interval; u_low, u_high: the one-sided bounds that `verdicts` rest on. kl (nats)
    and objective E[r] − β KL are None where the samples are not from the policy itself, for
    `kl_reason`.
    """

    u: dict[str, float]
    u_se: dict[str, float]
    u_skew: dict[str, float]
    u_ci_low: dict[str, float]
    u_ci_high: dict[str, float]
    u_low: dict[str, float]
    u_high: dict[str, float]
    verdicts: dict[str, str]
    reward: float
    reward_se: float
    utilities: dict[str, float]
    kl: float | None
    objective: float | None
    kl_reason: str | None
    num_prompts: int
    num_samples: int
    cut_off_fraction: float
    mean_length: float


def measure(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    *,
    confidence: float,
    not_the_policy: str | None,
) -> Measurement:
    """Estimate u, reward, utilities, KL, objective and lengths of a policy.

    samples, reference: responses of π_θ and π_ref to the same prompts. KL is the mean of
    log π_θ/π_ref over samples of π_θ, so it needs samples of the policy itself: `not_the_policy`
    says why they are not (`sampling_law.why_not_the_policy`).
    """
    u = estimate_subgradient(samples, reference, problem, confidence)
    bounds = one_sided_bounds(u, confidence)
    means = samples.groupby("prompt_id", sort=True)[problem.objectives].mean()
    reward = float(means[problem.reward].mean())
    kl = None
    if not_the_policy is None:
        kl = float(log_ratio(samples).groupby(samples["prompt_id"]).mean().mean())
    return Measurement(
        u=by_name(u["u"]),
        u_se=by_name(u["se"]),
        u_skew=by_name(u["skew"]),
        u_ci_low=by_name(u["low"]),
        u_ci_high=by_name(u["high"]),
        u_low=by_name(bounds["low"]),
        u_high=by_name(bounds["high"]),
        verdicts=judge(u, confidence),
        reward=reward,
        reward_se=standard_error(means[problem.reward]),
        utilities=by_name(means[problem.names].mean()),
        kl=kl,
        objective=None if kl is None else reward - problem.beta * kl,
        kl_reason=not_the_policy,
        num_prompts=len(means),
        num_samples=len(samples),
        cut_off_fraction=float((~samples["ended"].astype(bool)).mean()),
        mean_length=float(samples["token_ids"].map(len).mean()),
    )
