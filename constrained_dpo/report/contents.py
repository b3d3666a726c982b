"""What a report is drawn from: a run's files as they are now, and how its numbers are written."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.dual.exact import ExactOptimum
from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.evaluation.front_record import Front
from constrained_dpo.problem import Constraint
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory, RunState
from constrained_dpo.run.record import RoundRecord, read_optimum, read_records
from constrained_dpo.run.status import next_step
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet


@dataclass(frozen=True)
class Contents:
    """What a report is drawn from.

    records: round.json of every round done; optimum: exact.json or None; shown: the round whose
    policy is shown; front: that of its family, or None; reference: all of π_ref's responses to the
    test prompts; before, after: π_ref's and that policy's, one index (prompt_id, draw) for both, in
    the order of prompts.parquet.
    """

    run: RunDirectory
    recipe: Recipe
    state: RunState
    records: list[RoundRecord]
    optimum: dict[str, ExactOptimum] | None
    shown: int
    front: Front | None
    reference: pd.DataFrame
    before: pd.DataFrame
    after: pd.DataFrame

    @property
    def record(self) -> RoundRecord:
        return self.records[self.shown]

    @property
    def reference_means(self) -> pd.Series:
        """π_ref's mean scores on the test prompts, by objective; a prompt counts as one."""
        problem = self.recipe.problem
        reference = problem.reference_scores(self.reference.reset_index())
        return reference.groupby("prompt_id")[problem.objectives].mean().mean()

    def name_of(self, path: Path) -> str:
        """A file's name relative to the run, as captions give it."""
        return path.relative_to(self.run.path).as_posix()

    @property
    def round_files(self) -> list[str]:
        return [self.name_of(self.run.round_file(t)) for t in range(len(self.records))]

    def optimum_on(self, split: str) -> ExactOptimum | None:
        """A split's exact optimum, or that of all prompts where splits are not told apart."""
        return (self.optimum or {}).get(split) or (self.optimum or {}).get("all")


def read_contents(run: RunDirectory, number: int | None = None) -> Contents:
    """The run's files as they are now; number: the round whose policy is shown (None: the last one
    done).

    Raises UserError when no round has been played or there is no such round.
    """
    recipe, state = run.recipe(), run.state()
    done = state.rounds_done
    if not done:
        raise UserError(
            f"{run.path}: no round has been played yet, so there is nothing to report; next: "
            f"{next_step(run, recipe)}"
        )
    shown = done - 1 if number is None else number
    if not 0 <= shown < done:
        raise UserError(f"--round {number}: {run.path} has rounds 0 to {done - 1}")
    optimum = read_optimum(run)
    rank = {prompt_id: i for i, prompt_id in enumerate(run.prompts()["prompt_id"])}
    columns = ["prompt_id", "response", "token_ids", "ended", "split", *recipe.problem.columns]
    reference, after = (
        _test_responses(read_parquet(path, columns), rank)
        for path in (run.reference_file, run.samples_file(shown))
    )
    both = reference.index.intersection(after.index, sort=False)
    return Contents(
        run,
        recipe,
        state,
        read_records(run),
        optimum,
        shown,
        _front(run, shown),
        reference,
        reference.loc[both],
        after.loc[both],
    )


def _front(run: RunDirectory, shown: int) -> Front | None:
    """The front of a round's family; None where it has no point yet or is of another round's."""
    if not run.front_file.exists():
        return None
    front = Front.read(run.front_file)
    return front if front.rows and front.round == shown else None


def _test_responses(table: pd.DataFrame, rank: dict[str, int]) -> pd.DataFrame:
    """The test split, indexed by prompt and draw (0, 1, ... within a prompt)."""
    table = table[table["split"] == "test"].sort_values(
        "prompt_id", key=lambda ids: ids.map(rank), kind="stable"
    )
    draw = table.groupby("prompt_id").cumcount().rename("draw")
    return table.drop(columns="split").assign(draw=draw).set_index(["prompt_id", "draw"])


def lengths(responses: pd.DataFrame) -> pd.Series:
    """Tokens per response."""
    return responses["token_ids"].map(len)


def cut_off(responses: pd.DataFrame) -> float:
    """Share of responses that reached max_new_tokens before they ended."""
    return float((~responses["ended"].astype(bool)).mean())


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(measured: Measurement, name: str) -> str:
    """u of one constraint with its interval."""
    low, high = measured.u_ci_low[name], measured.u_ci_high[name]
    return f"{signed(measured.u[name])} [{signed(low)}, {signed(high)}]"


def level_words(constraint: Constraint) -> str:
    """What a constraint asks for."""
    if constraint.margin is not None:
        return f"at least {constraint.margin:g} above the reference policy"
    return f"at least {constraint.threshold:g}"
