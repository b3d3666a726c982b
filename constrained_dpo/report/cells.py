"""Cells and short words that several tables share."""

from rich.text import Text

from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.run.record import RoundRecord

# rich drops colours under NO_COLOR and in files and pipes.
COLOURS = {"satisfied": "green", "undecided": "yellow", "violated": "red"}


def number_cell(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def gap_cell(record: RoundRecord) -> str:
    """The Lagrangian gap, or its interval where the samples carry no estimate."""
    low, high = record.lagrangian_gap_low, record.lagrangian_gap_high
    if record.lagrangian_gap is not None or low is None:
        return number_cell(record.lagrangian_gap)
    return f"{max(low, 0.0):.2f} to {'?' if high is None else f'{high:.2f}'}"


def verdict_cell(word: str) -> Text:
    return Text(word, style=COLOURS[word])


def slack_cell(measured: Measurement, name: str) -> str:
    low, high = measured.u_ci_low[name], measured.u_ci_high[name]
    return f"{measured.u[name]:+.3f} [{low:+.3f}, {high:+.3f}]"


def at_bound_warning(name: str) -> str:
    """Say what a multiplier at dual.max_lambda means."""
    return (
        f"warning: λ({name}) is at dual.max_lambda: more weight on {name} was not enough to reach "
        f"its level; lower the margin or threshold of {name}, or give more responses per prompt"
    )
