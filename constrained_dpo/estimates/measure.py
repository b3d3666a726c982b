"""What is estimated of a policy from its samples, by split. numpy and pandas only."""

import numpy as np
import pandas as pd

from constrained_dpo.estimates.slack import estimate_subgradient
from constrained_dpo.estimates.verdict import judge, overall
from constrained_dpo.problem import ConstrainedProblem


def summarize(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    *,
    confidence: float,
    not_the_policy: str | None,
) -> dict[str, object]:
    """Estimates on one split: u with interval, reward, utilities, KL and objective, lengths.
    JSON-ready.

    samples, reference: responses of π_θ and π_ref on the same prompts. KL (nats) is the mean of log
    π_θ/π_ref over samples of π_θ, so it is null where the sampling law is not the policy, for the
    reason `not_the_policy` (`sampler_check.why_not_the_policy`).
    """
    u = estimate_subgradient(samples, reference, problem, confidence)
    means = samples.groupby("prompt_id", sort=True)[problem.objectives].mean()
    reward = float(means[problem.reward].mean())
    log_ratio = (samples["policy_logp"] - samples["ref_logp"]).groupby(samples["prompt_id"]).mean()
    kl = float(log_ratio.mean()) if not_the_policy is None else None
    record = {
        "u": u["u"].to_dict(),
        "u_se": u["se"].to_dict(),
        "u_skew": u["skew"].to_dict(),
        "u_ci_low": u["low"].to_dict(),
        "u_ci_high": u["high"].to_dict(),
        "reward": reward,
        "reward_se": float(means[problem.reward].std(ddof=1) / np.sqrt(len(means))),
        "utilities": means[problem.names].mean().to_dict(),
        "kl": kl,
        "objective": reward - problem.beta * kl if not_the_policy is None else None,
        "num_prompts": len(means),
        "num_samples": len(samples),
        "cut_off_fraction": float((~samples["ended"].astype(bool)).mean()),
        "mean_length": float(samples["token_ids"].map(len).mean()),
    }
    if not_the_policy is not None:
        record["kl_reason"] = not_the_policy
    return record


def measure(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    *,
    confidence: float,
    not_the_policy: str | None,
) -> dict[str, object]:
    """The record of one policy: estimates on the dual prompts, and under `test` on the test prompts
    with the verdict."""

    def on(split: str) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
        chosen, base = samples[samples["split"] == split], reference[reference["split"] == split]
        return (
            summarize(chosen, base, problem, confidence=confidence, not_the_policy=not_the_policy),
            chosen,
            base,
        )

    record, _, _ = on("dual")
    test, chosen, base = on("test")
    test["verdicts"] = judge(estimate_subgradient(chosen, base, problem, confidence), confidence)
    return {**record, "test": test, "verdict": overall(test["verdicts"])}
