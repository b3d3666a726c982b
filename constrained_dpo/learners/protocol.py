"""What a round asks of a learner."""

from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd


class Learner(Protocol):
    """What a round needs. Tables are those of `data_prep.tables`; an adapter is a folder that the
    learner wrote."""

    prompts: pd.DataFrame

    def fit(
        self,
        labels: pd.DataFrame,
        pool: pd.DataFrame,
        *,
        lambda_: pd.Series,
        previous: Path | None,
        output: Path,
        seed: int,
    ) -> None: ...

    def sample(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame: ...

    def score(self, responses: pd.DataFrame) -> pd.DataFrame: ...

    def log_probabilities(self, responses: pd.DataFrame, adapter: Path) -> np.ndarray: ...

    def identity(self) -> dict[str, object]: ...

    def exact(self, adapter: Path, lambda_: pd.Series) -> dict[str, dict] | None: ...

    def optimum(self) -> dict[str, dict] | None: ...

    def measured_scorers(self, pool: pd.DataFrame) -> dict[str, dict]: ...
