"""Satisfied, violated or undecided: what the interval of u allows to be said."""

import pandas as pd

from constrained_dpo.estimates.intervals import confidence_bound

SATISFIED, VIOLATED, UNDECIDED = "satisfied", "violated", "undecided"


def one_sided_bounds(u: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Columns low and high by constraint: one-sided bounds of u at the stated level over all
    constraints together (Bonferroni).

    u: `estimate_subgradient` (columns u, se, skew, num_prompts); score units.
    """
    tail = (1 - confidence) / max(len(u), 1)
    return pd.DataFrame({"low": confidence_bound(u, tail), "high": confidence_bound(u, 1 - tail)})


def judge(u: pd.DataFrame, confidence: float) -> dict[str, str]:
    """Verdict by constraint on fresh samples: satisfied, violated or undecided.

    u: `estimate_subgradient` (columns u, se, skew, num_prompts). Satisfied where the one-sided
    lower bound of u is > 0 (≥ 0 without sampling error), violated where the upper bound is < 0, at
    the stated level over all constraints together (Bonferroni).
    """
    bounds = one_sided_bounds(u, confidence)
    verdicts = {}
    for name, row in bounds.iterrows():
        exactly_met = row["low"] == row["high"] == 0
        verdicts[str(name)] = (
            SATISFIED
            if row["low"] > 0 or exactly_met
            else VIOLATED
            if row["high"] < 0
            else UNDECIDED
        )
    return verdicts


def overall(verdicts: dict[str, str]) -> str:
    """One word for all constraints: violated if any is, satisfied only if all are."""
    values = set(verdicts.values())
    return VIOLATED if VIOLATED in values else UNDECIDED if UNDECIDED in values else SATISFIED
