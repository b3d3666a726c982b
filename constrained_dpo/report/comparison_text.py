"""A comparison as cells: the table that the terminal, the markdown file and the HTML page share,
and the flat table of the csv."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from constrained_dpo.experiments.compare import Group, points
from constrained_dpo.experiments.rows import Row
from constrained_dpo.progress import duration
from constrained_dpo.recipe.methods import is_fixed, settings_line
from constrained_dpo.report.contents import signed


@dataclass(frozen=True)
class TextTable:
    """header: (num_columns,); rows: one list of cells per run, lines within a cell split by
    newlines; notes: footnotes and what to know."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def text_table(group: Group) -> TextTable:
    """One row per run: method, λ, demanded and achieved gain by utility, change of the reward, KL,
    objective, certificate, time."""
    reasons: list[str] = []

    def null(reason: str | None) -> str:
        """A dash with the number of its footnote."""
        if reason is None:
            return "–"
        if reason not in reasons:
            reasons.append(reason)
        return f"– ({reasons.index(reason) + 1})"

    levels = sorted({row.recipe.dual.confidence for row in group.rows})
    percent = f"{100 * levels[0]:g} %" if len(levels) == 1 else "interval"
    header = ["run", "λ"] + [f"{name}: demanded → gained [{percent}]" for name in group.utilities]
    header += [
        f"Δ {group.reward} [{percent}]",
        "KL",
        "objective",
        "below P* at most",
        "verdict",
        "rounds",
        "time",
    ]
    rows = [
        _cells(row, label, group, null) for row, label in zip(group.rows, group.labels, strict=True)
    ]
    lines = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return TextTable(header, rows, lines + _notes(group))


def _cells(row: Row, label: str, group: Group, null: Callable[[str | None], str]) -> list[str]:
    exact, problem = row.exact, row.recipe.problem
    lambdas = "\n".join(
        f"{name} {value:.4g}" if len(row.lambda_) > 1 else f"{value:.4g}"
        for name, value in row.lambda_.items()
    )

    def gain(name: str, demand: str) -> str:
        change = row.changes.get(name)
        if change is None:
            return "not scored"
        text = (
            f"{demand}{signed(change.difference)}\n[{signed(change.ci_low)}, "
            f"{signed(change.ci_high)}]"
        )
        return text + (
            f"\nexact {signed(exact.changes[name])}" if exact and name in exact.changes else ""
        )

    cells = [f"{row.name}\n{label}", lambdas or "–"]
    for name in group.utilities:
        cells.append(gain(name, f"{signed(row.demanded[name])} → " if name in row.demanded else ""))
    cells.append(gain(group.reward, ""))
    reward_name = "" if problem.reward == group.reward else f"\nof {problem.reward}"
    cells.append(signed(row.kl) if row.kl is not None else null(row.kl_reason))
    if row.objective is None:
        cells.append(null(row.kl_reason))
    else:
        cells.append(signed(row.objective) + reward_name)
    cells.append(
        f"{max(row.bound_gap, 0.0):.3f} ± {2 * row.bound_gap_se:.3f}"
        if row.bound_gap is not None and row.bound_gap_se is not None
        else null(row.bound_reason)
    )
    if exact:
        cells[-3] += f"\nexact {signed(exact.kl)}"
        cells[-2] += f"\nexact {signed(exact.objective)}"
        cells[-1] += f"\nexact P* {signed(exact.optimum)}" + (
            "" if exact.share is None else f"\n{100 * exact.share:.0f} % of the way"
        )
    cells.append("–" if is_fixed(row.recipe) else row.verdict)
    cells.append(
        f"{row.number + 1}" if row.rounds == row.number + 1 else f"{row.number + 1} of {row.rounds}"
    )
    return [*cells, ("" if row.whole else "> ") + duration(row.seconds)]


def _notes(group: Group) -> list[str]:
    """What a reader must know about the table, and every method's settings."""
    notes = [
        "Gains and changes are over π_ref on each run's test prompts, score units, paired by "
        "prompt; demanded: the gain that the margin or "
        "threshold demands (none where λ was fixed beforehand). Verdict: on the test prompts, all "
        "constraints together. Time: rounds.",
        "below P* at most: no policy that meets the constraints has an objective higher by more "
        "than this (estimated, ± two standard "
        "errors, dual prompts). % of the way: of the exact objective from π_ref to P*; over 100 % "
        "is bought by violating a constraint.",
    ]
    if any(not row.whole for row in group.rows):
        notes.append("A time with > lacks phases that were resumed after a stop.")
    if (
        len({row.recipe.objective.beta for row in group.rows}) > 1
        or len({row.recipe.problem.reward for row in group.rows}) > 1
    ):
        notes.append(
            "Objectives of runs with another β or another reward are other functions: do not "
            "compare them with each other."
        )
    if len({row.number for row in group.rows}) > 1:
        notes.append("The runs are shown after different numbers of rounds.")
    lines = {
        label: settings_line(row.recipe)
        for row, label in zip(group.rows, group.labels, strict=True)
    }
    return notes + [f"{label}: {line}" for label, line in lines.items()]


def means_table(group: Group) -> TextTable | None:
    """One row per method and setting: means over seeds of the gains with their intervals; None
    where no setting has two runs."""
    means = points(group)
    if (means["runs"] < 2).all():
        return None
    names = [*group.utilities, group.reward]
    rows = []
    for _, point in means.iterrows():
        cells = [point["method"], str(point["runs"])]
        for name in names:
            gain, low, high, demanded, exact = (
                point[f"{key}_{name}"] for key in ("gain", "low", "high", "demanded", "exact")
            )
            demand = "" if pd.isna(demanded) else f"{signed(demanded)} → "
            text = (
                "not scored"
                if pd.isna(gain)
                else f"{demand}{signed(gain)}\n[{signed(low)}, {signed(high)}]"
            )
            cells.append(text + ("" if pd.isna(exact) else f"\nexact {signed(exact)}"))
        rows.append(cells)
    note = (
        "Means over runs that differ in their seed alone, with Student's t-interval over them; "
        "of one run, its own interval over prompts."
    )
    header = [
        "method",
        "runs",
        *[f"{name}: demanded → gained" for name in group.utilities],
        f"Δ {group.reward}",
    ]
    return TextTable(header, rows, [note])


def flat_table(groups: list[Group]) -> pd.DataFrame:
    """Every run of every group, one row each, for the csv: plain numbers, empty where there is
    none."""
    table = []
    for number, group in enumerate(groups, 1):
        for row, label in zip(group.rows, group.labels, strict=True):
            flat = {
                "group": number,
                "run": row.name,
                "method": label,
                "settings": settings_line(row.recipe),
                "seed": row.recipe.seed,
                "beta": row.recipe.objective.beta,
                "reward": row.recipe.problem.reward,
                "round": row.number,
                "rounds": row.rounds,
            }
            exact = row.exact
            for name, change in row.changes.items():
                flat |= {
                    f"demanded.{name}": row.demanded.get(name),
                    f"lambda.{name}": row.lambda_.get(name),
                }
                flat |= {f"{key}.{name}": getattr(change, of) for key, of in _CHANGE.items()}
                flat[f"gain_exact.{name}"] = exact.changes[name] if exact else None
            flat |= {
                "kl": row.kl,
                "objective": row.objective,
                "below_optimum_at_most": row.bound_gap,
                "certificate_reason": row.bound_reason,
                "verdict": None if is_fixed(row.recipe) else row.verdict,
                "seconds": row.seconds,
                "seconds_whole": row.whole,
                "kl_exact": exact.kl if exact else None,
                "objective_exact": exact.objective if exact else None,
                "optimum_exact": exact.optimum if exact else None,
                "lambda_star": json.dumps(exact.lambda_star) if exact else None,
            }
            table.append(flat)
    return pd.DataFrame(table)


_CHANGE = {"gain": "difference", "gain_se": "se", "gain_low": "ci_low", "gain_high": "ci_high"}


def markdown(groups: list[Group]) -> str:
    """The tables of all groups as markdown."""
    parts = []
    for number, group in enumerate(groups, 1):
        if len(groups) > 1:
            parts.append(
                f"**Group {number}**"
                + (f", not comparable with group 1: {_escaped(group.apart)}" if group.apart else "")
            )
        for table in filter(None, (text_table(group), means_table(group))):
            lines = [table.header, ["---"] * len(table.header), *table.rows]
            parts.append(
                "\n".join(
                    "| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines
                )
            )
            parts.append("\n".join(f"- {_escaped(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
