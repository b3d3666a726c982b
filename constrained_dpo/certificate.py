"""What may be claimed of a policy: the verdict on the test prompts. numpy and scipy only."""

import numpy as np
import pandas as pd
from scipy import stats

SATISFIED, VIOLATED, UNDECIDED = "satisfied", "violated", "undecided"


def judge(u: pd.DataFrame, confidence: float) -> dict[str, str]:
    """Verdict by constraint on fresh test samples: satisfied, violated or undecided.

    u: `estimate_subgradient` on the test prompts (columns u, se, num_prompts). One-sided t-tests at the stated level over all
    constraints together (Bonferroni): satisfied where the lower bound of u is > 0 (≥ 0 without sampling error), violated where the
    upper bound is < 0.
    """
    verdicts = {}
    for name, row in u.iterrows():
        quantile = stats.t.ppf(1 - (1 - confidence) / len(u), max(row["num_prompts"] - 1, 1))
        half = quantile * row["se"] if np.isfinite(row["se"]) else np.inf
        if row["u"] - half > 0 or (half == 0 and row["u"] == 0):
            verdicts[name] = SATISFIED
        elif row["u"] + half < 0:
            verdicts[name] = VIOLATED
        else:
            verdicts[name] = UNDECIDED
    return verdicts


def overall(verdicts: dict[str, str]) -> str:
    """One word for all constraints: violated if any is, satisfied only if all are."""
    values = set(verdicts.values())
    return VIOLATED if VIOLATED in values else UNDECIDED if UNDECIDED in values else SATISFIED
