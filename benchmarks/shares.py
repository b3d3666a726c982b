"""What the tables call "gap closed", and means over seeds."""

from collections.abc import Sequence

import numpy as np

from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy
from constrained_dpo.estimates.intervals import t_interval


def share_closed(optimum: ExactOptimum, policy: ExactPolicy) -> float:
    """Share of the gap from π_ref's objective to P* that a policy closes; NaN where there is no
    gap."""
    share = optimum.share_closed(policy)
    return float("nan") if share is None else share


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Give the mean of one value a seed and its 95 % t-interval; of a single one, itself."""
    mean = float(np.mean(values))
    return (mean, *t_interval(values, 0.95)) if len(values) > 1 else (mean, mean, mean)
