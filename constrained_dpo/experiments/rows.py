"""A run at one of its rounds, on its test prompts: what it asked for, what it reached, and what its
certificate bounds."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import ExactPolicy
from constrained_dpo.estimates.certificate import best_bound
from constrained_dpo.estimates.slack import Change, changes
from constrained_dpo.estimates.verdict import VIOLATED
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.methods import is_fixed, is_weighted_sum, settings_line
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord, read_optimum, read_records
from constrained_dpo.run.steering import chosen_round
from data_prep.readers.tables import read_parquet
from data_prep.records import Record


class ExactRow(Record):
    """A row's values without sampling error, on the test prompts (score units, nats).

    changes, best: gains over π_ref by objective, of this policy and of the optimal one; optimum:
    P*; share: of the way from π_ref's objective to it, None where λ was fixed beforehand.
    """

    changes: dict[str, float]
    best: dict[str, float]
    kl: float
    objective: float
    optimum: float
    share: float | None
    lambda_star: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One run at one round, on its test prompts; score units.

    name: its folder's name, or the path where two share one; number: the round shown; rounds: those
    played. changes: by objective, policy against π_ref; demanded: by
    constraint, the gain over π_ref that was asked for (b, or c − ḡ_ref), empty where λ was fixed
    beforehand; exact: the same quantities without sampling error, where the world can be
    enumerated. bound_gap: min_t D(λ_t) − objective on the dual prompts with its standard error, or
    None with the reason. whole: no phase's time is missing after a stop.
    """

    name: str
    run: RunDirectory
    recipe: Recipe
    number: int
    rounds: int
    identity: dict[str, Any]
    lambda_: dict[str, float]
    changes: dict[str, Change]
    demanded: dict[str, float]
    kl: float | None
    objective: float | None
    kl_reason: str | None
    bound_gap: float | None
    bound_gap_se: float | None
    bound_reason: str | None
    verdict: str
    seconds: float
    whole: bool
    exact: ExactRow | None

    @property
    def setting(self) -> tuple[object, ...]:
        """What tells the points of one method's line apart: margins and thresholds as asked for, or
        a weighted sum's weights."""
        if is_weighted_sum(self.recipe):
            return tuple(self.lambda_.values())
        constraints = [] if is_fixed(self.recipe) else self.recipe.objective.constraints
        return tuple(c.margin if c.threshold is None else c.threshold for c in constraints)

    def values(self) -> dict[str, Any]:
        """Give the row JSON-ready."""
        return {
            "run": self.name,
            "path": str(self.run.path),
            "recipe": self.recipe.name,
            "settings": settings_line(self.recipe),
            "seed": self.recipe.seed,
            "beta": self.recipe.objective.beta,
            "reward": self.recipe.problem.reward,
            "round": self.number,
            "rounds": self.rounds,
            "lambda": self.lambda_,
            "demanded": self.demanded,
            "changes": {name: change.to_json() for name, change in self.changes.items()},
            "kl": self.kl,
            "objective": self.objective,
            "kl_reason": self.kl_reason,
            "optimality_gap": self.bound_gap,
            "optimality_gap_se": self.bound_gap_se,
            "certificate_reason": self.bound_reason,
            "verdict": self.verdict,
            "seconds": self.seconds,
            "seconds_whole": self.whole,
            "exact": None if self.exact is None else self.exact.to_json(),
            "identity": self.identity,
        }


def read_row(path: Path, choice: str, name: str) -> Row:
    """Read a run at the round that `--round` means. Raise UserError where there is no such round or
    no run."""
    run = RunDirectory(path)
    recipe, number = run.recipe(), chosen_round(run, choice)
    problem, confidence = recipe.problem, recipe.dual.confidence
    records = read_records(run, number + 1)
    record = records[-1]
    columns = ["prompt_id", "split", *problem.columns]
    samples, reference = (
        read_parquet(file, columns) for file in (run.samples_file(number), run.reference_file)
    )
    moved = changes(
        samples[samples["split"] == "test"],
        reference[reference["split"] == "test"],
        problem,
        confidence,
        recipe.score_ranges,
    )
    levels = problem.levels(
        pd.Series({name: moved[name].reference for name in problem.names}, dtype=float)
    )
    demanded = (
        {}
        if is_fixed(recipe)
        else {name: float(levels[name]) - moved[name].reference for name in problem.names}
    )
    gap, error, reason = _bound_gap(records)
    phases = [s for r in records for s in r.seconds.values()]
    return Row(
        name=name,
        run=run,
        recipe=recipe,
        number=number,
        rounds=run.rounds_done(),
        identity=identity(run),
        lambda_=record.policy_lambda,
        changes=moved,
        demanded=demanded,
        kl=record.test.kl,
        objective=record.test.objective,
        kl_reason=record.kl_reason,
        bound_gap=gap,
        bound_gap_se=error,
        bound_reason=reason,
        verdict=record.verdict,
        seconds=round(sum(s for s in phases if s is not None), 2),
        whole=all(r.seconds[phase] is not None for r in records for phase in ("fit", "rescore")),
        exact=_exact(run, record, recipe),
    )


def _bound_gap(records: Sequence[RoundRecord]) -> tuple[float | None, float | None, str | None]:
    """How much higher any policy's objective that meets the constraints may be, with its standard
    error (dual prompts); or None and why."""
    record, best = records[-1], best_bound(records)
    if best is None or best.dual_value is None or record.objective is None:
        return None, None, record.certificate_reason or record.kl_reason or "none was computed"
    if record.overall == VIOLATED:
        reason = "the constraints are violated on the dual prompts, so the objective is compared "
        return None, None, f"{reason}with no bound"
    error = float(np.hypot(best.dual_value_se or 0.0, record.objective_se or 0.0))
    return best.dual_value - record.objective, error, None


def _exact(run: RunDirectory, record: RoundRecord, recipe: Recipe) -> ExactRow | None:
    """None where the world cannot be enumerated."""
    here, optimum = record.exact_on("test"), read_optimum(run)
    if here is None or optimum is None:
        return None
    best, problem = optimum.get("test") or optimum["all"], recipe.problem
    return ExactRow(
        changes=_exact_changes(here, best.reference, problem),
        best=_exact_changes(best.optimal, best.reference, problem),
        kl=here.kl,
        objective=here.objective,
        optimum=best.objective,
        share=None if is_fixed(recipe) else best.share_closed(here),
        lambda_star=best.lambda_,
    )


def _exact_changes(
    values: ExactPolicy, start: ExactPolicy, problem: ConstrainedProblem
) -> dict[str, float]:
    """Exact gains over π_ref by objective."""
    gains = {name: values.utilities[name] - start.utilities[name] for name in problem.names}
    return {problem.reward: values.reward - start.reward} | gains


def identity(run: RunDirectory) -> dict[str, Any]:
    """Hash what two runs must share for their numbers to mean the same: π_ref, the sampling law,
    the test prompts, and every objective's scorer."""
    hashes, prompts = run.state().hashes, run.prompts()
    test = (
        prompts.loc[prompts["split"] == "test", ["prompt_id", "prompt"]]
        .sort_values("prompt_id")
        .to_numpy()
        .tolist()
    )
    content = hashlib.sha256(json.dumps(test).encode()).hexdigest()[:16]
    return {
        "policy": hashes["policy"],
        "law": hashes["law"],
        "test prompts": content,
        "scorers": hashes.get("scorers", {}),
    }
