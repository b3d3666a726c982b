"""s_λ = r + λ·g, the score that pseudo-preferences compare."""

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.tables import require_columns, require_finite


def lagrangian_score(responses: pd.DataFrame, reward: str, lambda_: pd.Series) -> np.ndarray:
    """s_λ = r + Σ_i λ_i g_i, shape (num_responses,), score units. `lambda_` is indexed by utility
    column.

    Raises UserError on a missing column, a score that is not finite, or a negative multiplier.
    """
    columns = [reward, *lambda_.index]
    require_columns(responses, columns, "responses")
    require_finite(responses, columns, "responses")
    for name, value in lambda_.items():
        if not np.isfinite(value) or value < 0:
            raise UserError(f"lambda of {name} is {value}; multipliers are finite and ≥ 0")
    score = responses[reward].to_numpy(np.float64).copy()
    for name, value in lambda_.items():  # elementwise: the same bits in every process
        score += value * responses[name].to_numpy(np.float64)
    return score
