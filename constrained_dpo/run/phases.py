"""A round under way: its phases, and what all of them read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from constrained_dpo.estimates.draws import draw_rule
from constrained_dpo.fit.family import Family
from constrained_dpo.launch import is_main, wait
from constrained_dpo.learners.collect import Collection
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.progress import timed
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.family import family_of, multiplier_range
from constrained_dpo.run.multipliers import chosen_loss
from data_prep.labels.multipliers import MultiplierRange


def phases(recipe: Recipe) -> list[str]:
    """Name the phases of a recipe's rounds, in order."""
    refresh = ["refresh"] if recipe.stretches > 1 else []
    trials = [] if recipe.fit.conditional is None else ["trials"]
    return ["relabel", "fit", *refresh, *trials, "rescore", "off_policy"]


@dataclass
class Round:
    """A round under way. seconds: by phase, None where it was resumed or there was none."""

    run: RunDirectory
    recipe: Recipe
    learner: Learner
    number: int
    lambda_: pd.Series
    seconds: dict[str, float | None]

    def phase(
        self, name: str, done: bool, action: Callable[[], None], shared: bool = False
    ) -> None:
        """Do what is not done yet: in every process where the work is shared, else in the main one.
        All leave it together."""
        if not done and (shared or is_main()):
            taken = timed(f"round {self.number}: {name}", action)
            self.seconds[name] = (self.seconds[name] or 0.0) + taken
        wait()

    @cached_property
    def law(self) -> pd.Series | MultiplierRange:
        """What the round's rows are labelled under: λ, or a range around it."""
        if self.recipe.fit.conditional is None:
            return self.lambda_
        return multiplier_range(self.run, self.recipe, self.lambda_)

    @cached_property
    def family(self) -> Family | None:
        """What is fitted where the fit is conditional."""
        law = self.law
        return family_of(self.run, self.recipe, law) if isinstance(law, MultiplierRange) else None

    @cached_property
    def loss(self) -> Literal["logistic", "listwise"]:
        """The loss of its fits."""
        return chosen_loss(self.run, self.recipe)

    @property
    def dual(self) -> pd.DataFrame:
        """The prompts that λ moves by."""
        prompts = self.run.prompts()
        return prompts[prompts["split"] == "dual"]

    def collection(self, phase: str, source: str, responses: int, adapter: Path) -> Collection:
        """Say what is drawn of a policy of this round."""
        return Collection(
            phase=phase,
            folder=self.run.shard_folder(phase),
            source=source,
            responses_per_prompt=responses,
            shard_size=self.recipe.sampling.shard_size,
            objectives=self.recipe.problem.columns,
            seed=self.recipe.seed,
            rule=draw_rule(self.recipe),
            round_number=self.number,
            adapter=adapter,
        )
