"""What a mean over samples is worth: its standard error, and the effective sample size below which
no weighted mean is trusted."""

import numpy as np
from numpy.typing import ArrayLike

MIN_ESS = 4.0
"""Effective samples per prompt. Below it the few responses that carry the weight say little of
those that were never drawn."""


def standard_error(values: ArrayLike) -> float:
    """Give the standard error of a mean over independent prompts: std/√N, inf for one prompt.

    values: (num_prompts,).
    """
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else np.inf
