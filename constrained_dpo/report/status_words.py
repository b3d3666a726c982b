"""Where a run stands, on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from constrained_dpo.estimates.certificate_words import sentence
from constrained_dpo.estimates.verdict import VIOLATED
from constrained_dpo.progress import duration
from constrained_dpo.report.cells import (
    at_bound_warning,
    gap_cell,
    number_cell,
    slack_cell,
    verdict_cell,
)
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.status import Activity, RunStatus


def certificate_line(records: Sequence[RoundRecord]) -> str:
    """Say the certificate of the last of these rounds, with what a reader needs to weigh it."""
    record = records[-1]
    meets = record.overall != VIOLATED
    claim = sentence(records, record.objective, record.objective_se, meets)
    line = f"certificate (dual prompts): {claim}"
    if record.ess is None:
        return line
    details = f"effective sample size {record.ess:.1f}"
    if record.residual is not None:
        details += f", off-policy residual {record.residual:.3f}"
    if (exact := (record.exact or {}).get("dual")) is not None:
        details += f"; exact distance from the best policy at this λ {exact.lagrangian_gap:.3f}"
    return f"{line} ({details})"


def print_status(console: Console, status: RunStatus) -> None:
    """Print where a run stands: a row per round, λ for the next one, what happens next."""
    console.print(f"{status.name}\n{status.problem}")
    if status.rounds:
        table = Table()
        head = ["round", "λ", "u on dual prompts", "u on test prompts", f"E[{status.reward}]", "KL"]
        for column in (*head, "objective", "gap at λ", "verdict on test"):
            table.add_column(column, justify="right")
        for record in status.rounds:
            lambdas = "\n".join(f"{n} {v:.4f}" for n, v in record.policy_lambda.items())
            slacks = ("\n".join(slack_cell(m, n) for n in m.u) for m in (record, record.test))
            numbers = (record.reward, record.kl, record.objective)
            word = verdict_cell(record.verdict)
            cells: tuple[str | Text, ...] = (*map(number_cell, numbers), gap_cell(record), word)
            table.add_row(str(record.round), lambdas, *slacks, *cells)
        console.print(table)
        console.print(certificate_line(status.rounds))
        choices = {"best": status.best, "best-dual": status.best_dual}
        words = ("none qualifies" if n is None else f"round {n}" for n in choices.values())
        lines = (f"--round {c}: {w}" for c, w in zip(choices, words, strict=True))
        console.print("; ".join(lines))
    if status.lambda_:
        values = ", ".join(f"{n} {v:.4f}" for n, v in status.lambda_.items())
        console.print(f"λ for the next round: {values}")
    for name in status.at_max_lambda:
        console.print(at_bound_warning(name))
    if left_out := {why: n for why, n in status.left_out.items() if n}:
        console.print("prompts left out: " + ", ".join(f"{n} {why}" for why, n in left_out.items()))
    if status.dataset:
        console.print(describe_answers(status.dataset))
    console.print(f"next: {status.next}")
    if status.rounds_left and status.seconds_per_round is not None:
        console.print(
            f"expected from the rounds so far: {duration(status.seconds_per_round)} a round, "
            f"{duration(status.seconds_left or 0.0)} for the {status.rounds_left} left"
        )


def activity_line(activity: Activity | None) -> str:
    """Say what a run's process is doing, and how long it still will."""
    if activity is None:
        return "now: no process works on it"
    if activity.phase is None and activity.label is None:
        return f"now: process {activity.process} is between two phases"
    line = f"now: {activity.phase or activity.label}"
    if activity.label and "-trial-" in activity.label:
        line += f" ({activity.label.removesuffix(': sample and score')})"
    if activity.total is not None:
        line += f": {activity.done} of {activity.total} {activity.unit}s"
    if activity.seconds is not None and activity.seconds >= 1:
        line += f", for {duration(activity.seconds)}"
    if activity.seconds_left is not None:
        line += f", about {duration(activity.seconds_left)} left"
    return line


def describe_answers(counts: dict) -> str:
    """Say how many of a dataset's responses are in the pool."""
    left_out = ", ".join(f"{n} {why}" for why, n in counts["left_out"].items() if n) or "none"
    return (
        f"the dataset's responses: {counts['responses']} to {counts['prompts']} prompts "
        f"({counts['prompts_without']} without); left out: {left_out}"
    )
