"""What is solved by trials, and the point that they lead to. pandas only."""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class SolveRule:
    """What is solved, and how well; Series by constraint.

    low, high: the box of λ, the trained range. tolerance: of |v_i|, score units. trials: how many
    there may be. kappa: range of κ (None: 1 throughout); kl_budget: KL to meet with κ, nats (None:
    κ stays at the value in its range that is nearest to 1).
    """

    low: pd.Series
    high: pd.Series
    tolerance: pd.Series
    trials: int = 8
    kappa: tuple[float, float] | None = None
    kl_budget: float | None = None


@dataclass(frozen=True)
class Solution:
    """The λ and κ to try next or, where `done`, to keep; reason: in words.

    predicted, predicted_se: v at λ by all trials, score units; kl, kl_se: likewise under a budget,
    nats. responds: whether u_i answers λ at all, or is where it should be without; where it does
    not, λ_i stays at its start.
    at_edge: "low" or "high" where no λ of the box up to that end meets v = 0, else "";
    kappa_at_edge: the same for the budget.
    """

    lambda_: pd.Series
    kappa: float
    done: bool
    reason: str
    predicted: dict[str, float]
    predicted_se: dict[str, float]
    responds: dict[str, bool]
    at_edge: dict[str, str]
    kl: float | None = None
    kl_se: float | None = None
    kappa_at_edge: str = ""
