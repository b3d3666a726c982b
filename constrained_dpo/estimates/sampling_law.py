"""Whether the samples are from the policy: the sampling law, and what a server drew beside the
policy as it is computed here."""

from typing import Any

import numpy as np
import pandas as pd

from data_prep.sampling.law import SamplingSettings, is_policy_law

NOT_THE_POLICY = (
    "sampled at sampling.temperature ≠ 1 or top_p < 1, so the samples are not from the policy "
    "itself (policy.temperature: another temperature as the policy's own)"
)


COMPARED_ROWS = 64
"""A comparison with fewer log-probabilities of the server says too little."""


def compare_sampler(table: pd.DataFrame) -> dict[str, Any]:
    """A server's law q beside the policy π, from its own samples with both log-probabilities
    (columns server_logp, policy_logp; nats).

    `rows`: how many have both; `kl`: mean(log q − log π), an unbiased estimate of KL(q‖π) per
    response, and `kl_quadratic`: mean((log q − log π)²)/2, the same to second order, never negative
    and less noisy (k1 and k2 of Schulman, "Approximating KL divergence", 2020); null without rows.
    `retokenized`: responses whose token ids are surely not those that were drawn.
    """
    inexact = int((~table["exact_ids"].astype(bool)).sum()) if "exact_ids" in table else len(table)
    if "server_logp" not in table:
        return {"rows": 0, "kl": None, "kl_quadratic": None, "retokenized": inexact}
    difference = (table["server_logp"] - table["policy_logp"]).to_numpy(np.float64)
    difference = difference[np.isfinite(difference)]
    if not len(difference):
        return {"rows": 0, "kl": None, "kl_quadratic": None, "retokenized": inexact}
    return {
        "rows": len(difference),
        "kl": float(difference.mean()),
        "kl_quadratic": float((difference**2).mean() / 2),
        "retokenized": inexact,
    }


def why_not_the_policy(sampling: SamplingSettings, *tables: pd.DataFrame) -> str | None:
    """Why KL, objective and certificate may not be estimated from these samples, or None.

    At temperature ≠ 1 or top_p < 1 never; from a server only where its log-probabilities say that
    it drew from the policy, in each of the tables: the divergence, however estimated, is within
    sampling.server.tolerance. A gap estimated from such samples is off by about β times that.
    """
    if not is_policy_law(sampling):
        return NOT_THE_POLICY
    server = sampling.server
    if server is None:
        return None
    if server.kind == "openai":
        return (
            "sampled by a server whose top_k and penalties cannot be set (kind: openai), so "
            "its law is not known"
        )
    for table in tables:
        comparison = compare_sampler(table)
        if comparison["rows"] < min(COMPARED_ROWS, len(table)):
            return (
                f"sampled by a server that gave log-probabilities of {comparison['rows']} of "
                f"{len(table)} responses, so its law cannot be "
                "compared with the policy"
            )
        distance = max(abs(comparison["kl"]), comparison["kl_quadratic"])
        if distance > server.tolerance:
            return (
                f"the server's samples are {distance:.2g} nats per response from the policy "
                "(sampling.server.tolerance "
                f"{server.tolerance:g}): serve the model in the policy's precision, with the same "
                "adapter"
            )
    return None
