"""What a round asks of a learner, and what it is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import ExactValues
from constrained_dpo.fit.family import Family
from constrained_dpo.fit.stretch import Stretch


@dataclass(frozen=True)
class FitJob:
    """One round's fit: what is trained on, where it starts from, where its adapter goes.

    labels: rows of the pairs or the groups table, under `lambda_` and tails at `tail_points`; pool:
    the responses they name.
    previous: the adapter or family to start from; output: the folder that appears when the fit is
    done; logs, checkpoints: folders for trackers and for a fit that may be killed. family: of a
    conditional fit, whose output is a family and no adapter. stretch: the part of the fit's
    schedule. loss: logistic or listwise, in place of the recipe's auto.
    """

    labels: pd.DataFrame
    pool: pd.DataFrame
    lambda_: pd.Series
    round_number: int
    seed: int
    previous: Path | None
    output: Path
    logs: Path
    checkpoints: Path
    tail_points: Mapping[str, float] = field(default_factory=dict)
    family: Family | None = None
    stretch: Stretch = field(default_factory=Stretch)
    loss: Literal["logistic", "listwise"] = "logistic"


class Source(Protocol):
    """What `collect` draws from: responses to prompts, and their scores.

    Tables are those of `data_prep.tables`.
    """

    def sample(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        """Draw responses of the policy with that adapter (None: π_ref), without scores."""

    def score(self, responses: pd.DataFrame) -> pd.DataFrame:
        """Add every objective's column (score units)."""


class Learner(Source, Protocol):
    """What fits, samples and scores for a run. An adapter is a folder that the learner wrote.

    prompts: the prompts table; exact: values without sampling error, where every response of the
    world is listed.
    """

    prompts: pd.DataFrame

    @property
    def exact(self) -> ExactValues | None: ...

    def fit(self, job: FitJob) -> None:
        """Write one round's adapter, or family, to `job.output`."""

    def write_member(self, family: Path, lambda_: pd.Series, kappa: float, output: Path) -> None:
        """Write the adapter of a family's member at λ and κ."""

    def log_probabilities(self, responses: pd.DataFrame, adapter: Path | None) -> np.ndarray:
        """Compute log π_θ (None: log π_ref) of stored responses: (num_responses,) nats."""

    def identity(self) -> dict[str, Any]:
        """Hash what the run's numbers depend on; say the sampling law in words."""

    def measured_scorers(self, pool: pd.DataFrame) -> dict[str, dict[str, Any]]:
        """Measure what is known of the scorers on π_ref's scored responses, by objective."""

    def truncated(self) -> dict[str, int]:
        """Count the texts that were cut to a scorer's window in this process, by objective."""

    def sampling_cost(self) -> dict[str, float] | None:
        """Give what sampling by servers has cost since the last call; None where none sampled."""
