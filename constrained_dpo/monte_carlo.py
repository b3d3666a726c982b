"""What a mean over samples is worth: its standard error, and the effective sample size below which
no weighted mean is trusted."""

import numpy as np
import pandas as pd

MIN_ESS = 4.0
"""Effective samples per prompt. Below it the few responses that carry the weight say little of
those that were never drawn."""


def standard_error(values: pd.Series | np.ndarray) -> float:
    """Give the standard error of a mean over independent prompts: std/√N, inf for one prompt.

    values: (num_prompts,).
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf
