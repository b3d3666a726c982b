"""log π_θ/π_ref, KL(π_θ‖π_ref) from samples, and the noise that both share with every score."""

import numpy as np
import pandas as pd


def log_ratio(table: pd.DataFrame) -> pd.Series:
    """Compute log π_θ(y|x) − log π_ref(y|x) of responses (nats)."""
    return table["policy_logp"] - table["ref_logp"]


def kl_values(samples: pd.DataFrame) -> pd.Series:
    """Give of each sample of π_θ a number whose mean is KL(π_θ‖π_ref), nats.

    path_kl, the sum over the response's prefixes of the KL between both next-token laws, where the
    table has it; else log π_θ/π_ref. Their means are equal: log π_θ/π_ref − path_kl is a sum of
    martingale differences (Amini et al., arXiv:2504.10637).
    """
    path = samples["path_kl"]
    return log_ratio(samples) if path.isna().any() else path


def path_noise(samples: pd.DataFrame) -> pd.Series:
    """Compute log π_θ/π_ref − path_kl of samples of π_θ: its mean is 0 at every prompt (nats).

    0 where the table has no path_kl.
    """
    return log_ratio(samples) - kl_values(samples)


def controlled(values: pd.Series, noise: pd.Series, prompts: pd.Series) -> pd.Series:
    """Take from values the part that noise of mean 0 explains: v − c n, with E unchanged.

    c is the pooled regression within prompts, for each prompt from all others, so that it does not
    depend on what it corrects (control variates). At the Lagrangian maximizer log π_θ/π_ref is
    linear in the score, and hardly anything of its noise is left.
    """
    centred = values - values.groupby(prompts).transform("mean")
    steps = noise - noise.groupby(prompts).transform("mean")
    product = (centred * steps).groupby(prompts).sum()
    square = (steps**2).groupby(prompts).sum()
    others = square.sum() - square
    slope = ((product.sum() - product) / others.where(others > 0, np.inf)).fillna(0.0)
    return values - prompts.map(slope) * noise
