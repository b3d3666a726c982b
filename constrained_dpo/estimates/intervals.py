"""Every confidence interval of the project. numpy, scipy and pandas only."""

import numpy as np
import pandas as pd
from scipy import special

from constrained_dpo.monte_carlo import standard_error


def seeds_interval(values: list[float], confidence: float) -> tuple[float, float, float]:
    """Mean of at least two independent values and its two-sided t-interval at the stated level."""
    mean, error = float(np.mean(values)), standard_error(np.asarray(values))
    room = float(special.stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
    return mean, mean - room, mean + room


def confidence_bound(u: pd.DataFrame, probability: float) -> pd.Series:
    """The `probability` quantile of what u may be in truth, by constraint: 0.05 gives a one-sided
    95 % lower bound (score units).

    u: columns u, se, skew, num_prompts. Student's t quantile, corrected for the skewness of the
    prompts' slacks by Hall's cubic transformation (On the removal of skewness by transformation, J.
    R. Stat. Soc. B 54, 1992): with few prompts and a long lower tail, a few prompts where the
    policy fails badly, the plain t-bound claims too much. Without skewness it is the t-bound.
    """
    count, skew = u["num_prompts"].astype(float), u["skew"].astype(float)
    quantile = pd.Series(special.stdtrit(np.maximum(count - 1, 1), 1 - probability), index=u.index)
    scaled: pd.Series = quantile / np.sqrt(count)
    safe = skew.where(skew.abs() > 1e-6, 1.0)
    corrected = 3 / safe * (np.cbrt(1 + safe * (scaled - safe / (6 * count))) - 1) * np.sqrt(count)
    move = corrected.where(skew.abs() > 1e-6, quantile)
    # Without a standard error (one prompt) nothing is known; without spread the mean is known.
    bound: pd.Series = u["u"] - u["se"].where(np.isfinite(u["se"]), 0.0) * move
    unknown = -np.inf if probability < 0.5 else np.inf
    bound[~np.isfinite(u["se"])] = unknown
    return bound
