"""s_λ = r + λ·g, the score that pseudo-preferences compare."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.labels.multipliers import MultiplierRange, multiplier_columns
from data_prep.tables import CATEGORY_MARK, require_columns, require_scores, score_values


def lagrangian_score(responses: pd.DataFrame, reward: str, lambda_: pd.Series) -> np.ndarray:
    """s_λ = r + Σ_i λ_i g_i, shape (num_responses,), score units. `lambda_` is indexed by utility
    column; a utility counts 0 for a prompt that it does not concern.

    Raises UserError on a missing column, a score that is not finite, or a negative multiplier.
    """
    columns = [reward, *lambda_.index]
    require_columns(responses, columns, "responses")
    require_scores(responses, columns, "responses", shard=True)
    for name, value in lambda_.items():
        if not np.isfinite(value) or value < 0:
            raise UserError(f"lambda of {name} is {value}; multipliers are finite and ≥ 0")
    score = responses[reward].to_numpy(np.float64).copy()
    for name, value in lambda_.items():  # elementwise: the same bits in every process
        score += value * score_values(responses, str(name))
    return score


@dataclass(frozen=True)
class LabelScores:
    """What the scores of label rows are made of, by response.

    base: (num_responses,) s_λ where λ is fixed, r where each label row draws its λ; utilities: by
    their column of multipliers, (num_responses,) g_i of each λ_i that is drawn, null where it does
    not concern the prompt; law: of the drawn multipliers, None where λ is fixed. Scores are in
    score units.
    """

    base: np.ndarray
    utilities: dict[str, np.ndarray]
    law: MultiplierRange | None

    @classmethod
    def of(
        cls, responses: pd.DataFrame, reward: str, lambda_: pd.Series | MultiplierRange
    ) -> "LabelScores":
        """Take the scores of a table of responses. Raises UserError as `lagrangian_score` does."""
        if isinstance(lambda_, pd.Series):
            return cls(lagrangian_score(responses, reward, lambda_), {}, None)
        names = [str(name) for name in lambda_.center.index]
        base = lagrangian_score(responses, reward, pd.Series(dtype=float))
        require_columns(responses, names, "responses")
        require_scores(responses, names, "responses", shard=True)
        columns = zip(multiplier_columns(names), names, strict=True)
        values = {c: responses[n].to_numpy(np.float64, na_value=np.nan) for c, n in columns}
        return cls(base, values, lambda_)

    def take(self, rows: np.ndarray) -> "LabelScores":
        """Take the scores of some responses, in their order."""
        utilities = {column: values[rows] for column, values in self.utilities.items()}
        return LabelScores(self.base[rows], utilities, self.law)

    def draw(self, places: np.ndarray, seed: int, *keys: np.ndarray) -> pd.DataFrame:
        """Draw the multipliers of label rows as `MultiplierRange.draw`; null where a utility does
        not concern the row's prompt; no column where λ is fixed.

        places: (num_rows,) a response of each row.
        """
        if self.law is None:
            return pd.DataFrame(index=pd.RangeIndex(len(places)))
        drawn = self.law.draw(seed, *keys)
        for column, utility in self.utilities.items():
            absent = np.isnan(utility[places])
            if absent.any():
                drawn[column] = drawn[column].mask(absent)
        return drawn

    def at(self, places: np.ndarray, multipliers: pd.DataFrame) -> np.ndarray:
        """Give s = r + λ·g of the responses at `places`, each under its label row's multipliers,
        shape (len(places),)."""
        score: np.ndarray = self.base[places]
        for column, utility in self.utilities.items():
            term = multipliers[column].to_numpy() * utility[places]
            score += np.nan_to_num(term) if CATEGORY_MARK in column else term
        return score
