"""A run's λ history against its tables and recipe (`cdpo check RUN`)."""

import pandas as pd
from pydantic import Field

from constrained_dpo.estimates.score_scale import ScoreScale, score_scale
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import replay
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet
from data_prep.records import Record


class History(Record):
    """A run's history, recomputed.

    run: its path; lambda_: the multipliers by round, equal to those in state.json; scale: of its
    scores at λ_0, None before `prepare`.
    """

    run: str
    lambda_: list[dict[str, float]] = Field(alias="lambda")
    scale: ScoreScale | None


def check_history(run: RunDirectory) -> History:
    """Recompute a run's multipliers from its tables and recipe.

    Raises UserError where a stored one differs.
    """
    state, recipe = run.state(), run.recipe()
    if not state.prepared:
        return History(run=str(run.path), lambda_=[], scale=None)
    recomputed = replay(run)
    for number, (stored, again) in enumerate(zip(state.lambda_, recomputed, strict=True)):
        if stored != again:
            raise UserError(
                f"{run.state_file}: λ of round {number} is {stored}, but the run's tables and "
                f"recipe give {again}"
            )
    drawn = run.reference_file if recipe.pool.source == "dataset" else run.pool_file(None)
    pool = read_parquet(drawn, ["prompt_id", *recipe.problem.columns])
    first = pd.Series(recomputed[0], dtype=float)
    problem = recipe.at_tail_points(state.tail_points_of(0)).problem
    scale = score_scale(pool, problem, first, "λ_0 of the run")
    return History(run=str(run.path), lambda_=recomputed, scale=scale)
