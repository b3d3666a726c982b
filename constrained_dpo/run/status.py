"""Where a run stands, what its process is doing, and what happens next."""

import json
import os
import socket
import time
from typing import Any

from pydantic import Field

from constrained_dpo.progress import LATE
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord, read_records
from constrained_dpo.run.steering import best_dual_round, best_round
from data_prep.errors import UserError
from data_prep.records import Record

FORGOTTEN = 3600.0
"""Seconds after which a file of another machine's process is taken for what a kill left."""


class RunStatus(Record):
    """Where a run stands.

    name: the recipe's; problem: in words; reward: its name; confidence: of verdicts. lambda_: for
    the next round, None before `prepare`; at_max_lambda: constraints whose multiplier is at its
    bound; left_out: prompts by reason; dataset: facts of a dataset's responses in the pool; rounds:
    records of those that are done; best, best_dual: the rounds that `--round` would choose, None
    where none qualifies; next: what happens next, in words; rounds_left: of the recipe's;
    `seconds_*`: expected from the rounds so far.
    """

    name: str
    problem: str
    reward: str
    confidence: float
    lambda_: dict[str, float] | None = Field(alias="lambda")
    at_max_lambda: list[str]
    left_out: dict[str, int]
    dataset: dict[str, Any] | None
    rounds: list[RoundRecord]
    best: int | None
    best_dual: int | None
    next: str
    rounds_left: int
    seconds_per_round: float | None
    seconds_left: float | None


def read_status(run: RunDirectory) -> RunStatus:
    """Read where a run stands from its files."""
    recipe, state, records = run.recipe(), run.state(), read_records(run)
    per_round = expected_round_seconds(records)
    left = max(recipe.dual.rounds - len(records), 0)
    current = state.lambda_[-1] if state.prepared else None
    bound = recipe.dual.max_lambda
    return RunStatus(
        name=recipe.name,
        problem=recipe.problem.describe(),
        reward=recipe.problem.reward,
        confidence=recipe.dual.confidence,
        lambda_=current,
        at_max_lambda=[name for name, value in (current or {}).items() if value >= bound],
        left_out=state.left_out,
        dataset=run.dataset_record(),
        rounds=records,
        best=_best(records, recipe),
        best_dual=_best_dual(records),
        next=next_step(run, recipe),
        rounds_left=left,
        seconds_per_round=per_round,
        seconds_left=None if per_round is None else round(left * per_round, 2),
    )


def _best(records: list[RoundRecord], recipe: Recipe) -> int | None:
    try:
        return best_round(records, recipe.dual.confidence)
    except UserError:
        return None


def _best_dual(records: list[RoundRecord]) -> int | None:
    try:
        return best_dual_round(records)
    except UserError:
        return None


def next_step(run: RunDirectory, recipe: Recipe) -> str:
    """Say what happens next."""
    state, rounds = run.state(), recipe.dual.rounds
    if not state.prepared:
        return "prepare: sample and score the reference policy (cdpo prepare)"
    number = state.rounds_done
    if number >= rounds:
        return (
            f"all {rounds} rounds of the recipe are done (cdpo report, evaluate or export; "
            "cdpo round plays another)"
        )
    conditional = recipe.fit.conditional is not None
    files = {
        "relabel": run.labels_file(number, recipe.fit.grouped),
        "fit": run.family_folder(number) if conditional else run.adapter_folder(number),
        "trials": run.adapter_folder(number),
        "rescore": run.samples_file(number),
    }
    phase = next((name for name, path in files.items() if not path.exists()), None)
    if phase is None:
        return f"round {number} of {rounds}: dual step (cdpo round)"
    return f"round {number} of {rounds}: {phase} (cdpo round, or cdpo run for all that are left)"


def expected_round_seconds(records: list[RoundRecord]) -> float | None:
    """Expect the seconds of a round: the sum over phases of their mean in the rounds that ran them
    whole (a resumed phase has none); None before.

    Not every round has refreshes and trials, nor off_policy at temperature ≠ 1 or top_p < 1.
    """
    total = 0.0
    for phase in ("relabel", "fit", "refresh", "trials", "rescore", "off_policy"):
        times = [s for r in records if (s := r.seconds.get(phase)) is not None]
        if not times and phase in ("relabel", "fit", "rescore"):
            return None
        total += sum(times) / max(len(times), 1)
    return round(total, 2)


class Activity(Record):
    """What the process that holds a run is doing.

    phase: None between two phases; seconds: since it began; label, done, total, unit: of its bar,
    None where it has none; seconds_left: of the bar, or of a phase as the last round took it; None
    where nothing is known.
    """

    process: int
    phase: str | None
    seconds: float | None
    label: str | None
    done: int | None
    total: int | None
    unit: str | None
    seconds_left: float | None


def read_activity(run: RunDirectory) -> Activity | None:
    """Read what a run's process is doing from its file; None where no process holds the run."""
    try:
        content = json.loads(run.progress_file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    now, bar = time.time(), content.get("bar")
    if not _alive(content, now - run.progress_file.stat().st_mtime):
        return None
    phase, left = content.get("phase"), None
    if bar is not None and bar["seconds_left"] is not None:
        left = max(LATE * bar["seconds_left"], bar["seconds_left"] - (now - bar["at"]))
    elif bar is None and phase is not None:
        usual = _usual_seconds(run, phase)
        left = None if usual is None else max(0.0, usual - (now - content["began"]))
    counts = {key: None if bar is None else bar[key] for key in ("label", "done", "total", "unit")}
    return Activity(
        process=content["process"],
        phase=phase,
        seconds=None if phase is None else now - content["began"],
        seconds_left=left,
        **counts,
    )


def _alive(content: dict[str, Any], age: float) -> bool:
    """Whether the process of a file is still there; of another machine's only the file's age is
    known."""
    if content.get("host") != socket.gethostname():
        return age < FORGOTTEN
    try:
        os.kill(content["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _usual_seconds(run: RunDirectory, phase: str) -> float | None:
    """What the last round took for a phase that a round has once and that counts nothing."""
    records = read_records(run)
    name = phase.rpartition(": ")[2]
    return records[-1].seconds.get(name) if records and name == "off_policy" else None
