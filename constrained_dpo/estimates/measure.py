"""What is estimated of a policy from its samples on one set of prompts."""

from dataclasses import dataclass

import pandas as pd

from constrained_dpo.estimates.kl import controlled, kl_values, path_noise
from constrained_dpo.estimates.slack import Bounds, estimate_subgradient
from constrained_dpo.estimates.verdict import judge, overall
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.problem import ConstrainedProblem, by_name
from data_prep.records import Record


@dataclass(frozen=True)
class Rule:
    """What an interval and a verdict are measured by.

    confidence: of the two-sided intervals; verdict_confidence: of the verdict, after what other
    looks at the same prompts have spent; bounds: of a prompt's slack, by constraint; bounded:
    constraints whose bounds follow from the score's range.
    """

    confidence: float
    verdict_confidence: float
    bounds: Bounds
    bounded: frozenset[str]


class Measurement(Record):
    """Estimates of a policy on one set of prompts; dicts are by constraint, score units.

    u: the slack; u_se: its standard error; `u_ci_*`: its two-sided interval. reward: E[r];
    utilities: E[g]; `*_se`: a mean's standard error, by prompt. overall: the verdict on all
    constraints, which rests on u_low, one-sided bounds at `verdict_confidence`; verdicts: on each,
    which rest on `u_each_*`, one-sided bounds for all of them together. u_bounds: of a prompt's
    slack; bounds_seen: constraints whose bounds are the lowest and highest seen, because nothing
    else bounds their scores. kl (nats) and objective E[r] − β KL are None where the samples are not
    from the policy itself, for `kl_reason`. num_prompts, num_samples: what it rests on;
    cut_off_fraction: of the responses, those that did not end; mean_length: in tokens.
    """

    u: dict[str, float]
    u_se: dict[str, float]
    u_ci_low: dict[str, float]
    u_ci_high: dict[str, float]
    u_low: dict[str, float]
    u_each_low: dict[str, float]
    u_each_high: dict[str, float]
    u_bounds: dict[str, tuple[float, float]]
    bounds_seen: list[str]
    overall: str
    verdicts: dict[str, str]
    verdict_confidence: float
    reward: float
    reward_se: float
    utilities: dict[str, float]
    kl: float | None
    kl_se: float | None
    objective: float | None
    objective_se: float | None
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
    rule: Rule,
    not_the_policy: str | None,
    off_policy: pd.DataFrame | None = None,
) -> Measurement:
    """Estimate u, reward, utilities, KL, objective and lengths of a policy.

    samples, reference: responses of π_θ and π_ref to the same prompts; off_policy: π_ref's with
    π_θ's log-probabilities, for u. KL needs samples of the policy itself: `not_the_policy` says why
    they are not (`sampling_law.why_not_the_policy`). The noise of KL, objective and reward that
    log π_θ/π_ref explains is taken out (`kl.controlled`). Standard errors are of means over
    prompts; the objective's is of the difference r − β KL itself.
    """
    bounds = rule.bounds
    u = estimate_subgradient(
        samples, reference, problem, rule.confidence, bounds, rule.verdict_confidence, off_policy
    )
    means = problem.scores(samples).groupby("prompt_id", sort=True)[problem.objectives].mean()
    reward, kl, objective = means[problem.reward], None, None
    if not_the_policy is None:
        prompts, noise, kls = samples["prompt_id"], path_noise(samples), kl_values(samples)
        rewards = samples[problem.reward]
        reward, kl, objective = (
            controlled(values, noise, prompts).groupby(prompts).mean()
            for values in (rewards, kls, rewards - problem.beta * kls)
        )
    return Measurement(
        u=by_name(u["u"]),
        u_se=by_name(u["se"]),
        u_ci_low=by_name(u["low"]),
        u_ci_high=by_name(u["high"]),
        u_low=by_name(u["one_low"]),
        u_each_low=by_name(u["each_low"]),
        u_each_high=by_name(u["each_high"]),
        u_bounds={name: bounds[name] for name in problem.names},
        bounds_seen=[n for n in problem.names if n not in rule.bounded],
        overall=overall(u),
        verdicts=judge(u),
        verdict_confidence=rule.verdict_confidence,
        reward=float(reward.mean()),
        reward_se=standard_error(reward),
        utilities=by_name(means[problem.names].mean()),
        kl=None if kl is None else float(kl.mean()),
        kl_se=None if kl is None else standard_error(kl),
        objective=None if objective is None else float(objective.mean()),
        objective_se=None if objective is None else standard_error(objective),
        kl_reason=not_the_policy,
        num_prompts=len(means),
        num_samples=len(samples),
        cut_off_fraction=float((~samples["ended"].astype(bool)).mean()),
        mean_length=float(samples["token_ids"].map(len).mean()),
    )
