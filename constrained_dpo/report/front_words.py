"""A front on the terminal: a row for every point, and what a reader has to know beside it."""

from rich.console import Console
from rich.table import Table

from constrained_dpo.evaluation.front_record import Front, FrontRow
from constrained_dpo.report.cells import verdict_cell
from constrained_dpo.report.contents import signed


def setting_words(row: FrontRow) -> str:
    """Say what a point is: the levels that λ was solved for, or the λ that was given, and κ."""
    if row.solved:
        words = [f"{name} ≥ {level:g}" for name, level in row.levels.items()]
    else:
        words = [f"λ({name}) = {value:.4g}" for name, value in row.lambda_.items()]
    return ", ".join(words + ([f"κ = {row.kappa:.4g}"] if row.kappa != 1 else []))


def row_notes(row: FrontRow) -> list[str]:
    """Say where a point is not what a reader would expect of its setting."""
    notes = [
        f"no λ({name}) in range meets the margin; this is the {_end(end)} one"
        for name, end in row.at_edge.items()
    ]
    outside = [f"λ({name})" for name in row.outside] + ["κ"] * bool(row.kappa_outside)
    if outside:
        notes.append(f"outside the trained range: {' and '.join(outside)}")
    return notes


def _end(end: str) -> str:
    return "largest" if end == "high" else "smallest"


def gain(row: FrontRow, name: str) -> str:
    """E_π[g] − E_π_ref[g] with its interval."""
    low, high = row.gain_interval(name)
    return f"{signed(row.gains[name])} [{signed(low)}, {signed(high)}]"


def slack(row: FrontRow, name: str) -> str:
    """u with its interval."""
    low, high = row.u_ci_low[name], row.u_ci_high[name]
    return f"{signed(row.u[name])} [{signed(low)}, {signed(high)}]"


def with_error(value: float | None, error: float | None) -> str:
    """A value with its standard error, or a dash."""
    return "–" if value is None or error is None else f"{signed(value)} ± {error:.3f}"


def distance(row: FrontRow) -> str:
    """KL to π_ref with its standard error, or a dash."""
    return "–" if row.kl is None or row.kl_se is None else f"{row.kl:.3f} ± {row.kl_se:.3f}"


def front_notes(front: Front) -> list[str]:
    """Say what the numbers of a front are, and what its verdicts rest on."""
    percent = f"{100 * front.confidence:g} %"
    ranges = ", ".join(f"λ({n}) {front.low[n]:.3g} to {front.high[n]:.3g}" for n in front.levels)
    lines = [
        f"intervals are two-sided at {percent}, ± is a standard error; one prompt is one "
        "observation; change: of the reward against the round's own policy, prompts paired; gain: "
        "over π_ref",
        f"every point is one look at the test prompts, and all looks of the run together hold at "
        f"{percent}: a verdict is held at more, the more looks there were before it",
    ]
    if ranges:
        lines.append(f"the family was trained on {ranges}")
    return lines


def print_front(console: Console, front: Front) -> None:
    """Print the newest family's points, one a row; `outside` marks a λ or κ beyond what it was
    trained on."""
    names = list(front.levels)
    percent = f"{100 * front.confidence:g} %"
    table = Table("setting", title=f"front of round {front.round}", title_justify="left")
    for column in ("λ", f"E[{front.reward}]", "change", f"gain [{percent}]", f"u [{percent}]"):
        table.add_column(column, justify="right")
    for column in ("KL", "objective", "verdict", "notes"):
        table.add_column(column, justify="left" if column == "notes" else "right")
    for row in front.rows:
        lambdas = "\n".join(f"{row.lambda_[name]:.4f}" for name in names)
        marks = ["edge"] * bool(row.at_edge)
        marks += ["outside"] * bool(row.outside or row.kappa_outside)
        table.add_row(
            setting_words(row).replace(", ", "\n"),
            lambdas,
            signed(row.reward),
            with_error(row.reward_change, row.reward_change_se),
            "\n".join(gain(row, name) for name in names),
            "\n".join(slack(row, name) for name in names),
            "–" if row.kl is None else f"{row.kl:.2f}",
            signed(row.objective),
            verdict_cell(row.verdict),
            ", ".join(marks),
        )
    console.print(table)
    for line in front_notes(front):
        console.print(line, soft_wrap=True)
    if any(row.at_edge or row.outside or row.kappa_outside for row in front.rows):
        console.print(
            "edge: no λ that was searched meets the margin; outside: λ or κ lies outside the "
            "trained range",
            soft_wrap=True,
        )
