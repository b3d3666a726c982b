"""The log-ratio of two policies and its mean, the KL divergence."""

import pandas as pd


def log_ratio(table: pd.DataFrame) -> pd.Series:
    """log π_θ − log π_ref of every response (nats)."""
    return table["policy_logp"] - table["ref_logp"]
