"""What the points of a round's front have in common: the family, what it was trained on, and the
tables that they are measured against. Each table is read once."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from constrained_dpo.evaluation.front_record import Setting
from constrained_dpo.fit.family import is_family, read_family
from constrained_dpo.problem import ConstrainedProblem, by_name
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.family import multiplier_range
from constrained_dpo.run.fits import last_family
from constrained_dpo.run.multipliers import demanded, seen_slack
from constrained_dpo.run.record import RoundRecord
from data_prep.files import hash_file
from data_prep.labels.multipliers import MultiplierRange
from data_prep.readers.tables import read_parquet

KEPT_ADAPTER = "adapter"
"""In a point's folder, where its member was distilled: an export is the very one."""


@dataclass(frozen=True)
class FrontOptions:
    """How a front is drawn. responses: per prompt (None: dual.responses_per_prompt); seed: another
    draws others."""

    responses: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class FrontSource:
    """What the points of a round's front have in common."""

    run: RunDirectory
    recipe: Recipe
    number: int
    options: FrontOptions

    @cached_property
    def family(self) -> Path:
        return last_family(self.run, self.number)

    @cached_property
    def distilled(self) -> bool:
        """Whether members of the family are fitted, by category."""
        return is_family(self.family) and bool(read_family(self.family).shared)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the round's number and the family's files."""
        files = [f"{file.name}:{hash_file(file)}" for file in sorted(self.family.iterdir())]
        return hashlib.sha256(f"{self.number}:{files}".encode()).hexdigest()[:16]

    @cached_property
    def record(self) -> RoundRecord:
        return RoundRecord.read(self.run.round_file(self.number))

    @cached_property
    def law(self) -> MultiplierRange:
        """The multipliers that the family was trained on."""
        center = self.recipe.problem.multipliers(self.run.state().lambda_[self.number])
        return multiplier_range(self.run, self.recipe, center)

    @cached_property
    def reference(self) -> pd.DataFrame:
        return read_parquet(self.run.reference_file)

    @cached_property
    def needed(self) -> pd.Series:
        return demanded(self.run, self.recipe)[0]

    @cached_property
    def slack_of_rounds(self) -> list[pd.DataFrame]:
        """Slacks by prompt at the recipe's levels, in the tables of the rounds."""
        return seen_slack(self.run, self.recipe.problem)

    @property
    def responses(self) -> int:
        return self.options.responses or self.recipe.dual.responses_per_prompt

    def key(self, setting: Setting) -> str:
        """Name a point's folder."""
        return setting.key(self.fingerprint, self.responses, self.options.seed)

    def problem(self, setting: Setting) -> ConstrainedProblem:
        """The recipe's problem at the setting's levels."""
        problem = self.recipe.problem
        if setting.margins is None:
            return problem
        constraints = (c.at(setting.margins[c.name]) for c in problem.constraints)
        return replace(problem, constraints=tuple(constraints))

    def outside(self, lambda_: pd.Series, kappa: float) -> tuple[dict[str, str], str]:
        """Tell at which end λ, by constraint, and κ leave what the family was trained on; "" within
        it."""
        slip = 1e-9
        low, high = self.law.low * (1 - slip), self.law.high * (1 + slip)
        ends = {
            name: "low" if value < low[name] else "high"
            for name, value in by_name(lambda_).items()
            if not low[name] <= value <= high[name]
        }
        least, most = self.law.kappa or (1.0, 1.0)
        end = "low" if kappa < least * (1 - slip) else "high" if kappa > most * (1 + slip) else ""
        return ends, end

    def means(self) -> dict[str, float]:
        """π_ref's means on the test prompts, by objective."""
        problem = self.recipe.problem
        table = problem.reference_scores(of_split(self.reference, "test"))
        return by_name(table.groupby("prompt_id")[problem.objectives].mean().mean())


def of_split(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of one set of prompts."""
    return table[table["split"] == split]
