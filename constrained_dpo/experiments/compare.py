"""Runs beside each other: which may be compared, and means over seeds.

Every number comes from a run's tables, its round.json and exact.json; nothing is sampled.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.estimates.intervals import t_interval
from constrained_dpo.experiments.rows import Row, read_row
from constrained_dpo.recipe.methods import is_fixed, is_weighted_sum, method_labels
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.prompts.messages import last_user_text
from data_prep.readers.tables import read_parquet


@dataclass(frozen=True)
class Group:
    """Runs that may be compared with each other. labels: method by row; apart: why they are not
    compared with group 1, or None."""

    rows: list[Row]
    labels: list[str]
    apart: str | None

    @property
    def reward(self) -> str:
        """The objective on the vertical axis: the reward of most runs (a run of one utility alone
        has that as its reward)."""
        rewards = [row.recipe.problem.reward for row in self.rows]
        return max(dict.fromkeys(rewards), key=rewards.count)

    @property
    def utilities(self) -> list[str]:
        """Every other objective of any run, in order."""
        names = dict.fromkeys(name for row in self.rows for name in row.recipe.problem.objectives)
        return [name for name in names if name != self.reward]


def why_not_comparable(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Say what differs between two identities; None where the runs may be compared on the
    objectives they share."""
    words = {
        "policy": "another reference policy",
        "law": "another sampling law",
        "test prompts": "other test prompts",
    }
    reasons = [
        f"{reason} ({other[key]} against {one[key]})"
        for key, reason in words.items()
        if one[key] != other[key]
    ]
    scorers, others = one["scorers"], other["scorers"]
    shared = [name for name in scorers if name in others]
    reasons += [
        f"another scorer of {name} ({others[name]} against {scorers[name]})"
        for name in shared
        if scorers[name] != others[name]
    ]
    if scorers and others and not shared:
        reasons.append(f"no objective in common ({', '.join(others)} against {', '.join(scorers)})")
    return ", ".join(reasons) or None


def read_groups(paths: list[Path], choice: str) -> tuple[list[Group], list[tuple[str, str]]]:
    """The runs in groups that may be compared, in the order given; and the runs left out (no such
    round), with the reason.

    Raises UserError where a path is no run, a run is given twice, or nothing is left to compare.
    """
    rows, left_out = [], []
    names = [path.resolve().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        if sum(other.resolve() == path.resolve() for other in paths) > 1:
            raise UserError(f"{path}: is given twice; give every run once")
        RunDirectory(path).recipe()  # not a run: refused, not left out
        name = name if names.count(name) == 1 else str(path)
        try:
            rows.append(read_row(path, choice, name))
        except UserError as error:
            left_out.append((name, str(error)))
    if not rows:
        raise UserError(
            "\n".join(f"{name}: cannot be compared: {reason}" for name, reason in left_out)
        )
    alike = _alike(rows)
    first = rows[0].identity
    apart: list[str | None] = [None]
    for others in alike[1:]:
        reasons = (why_not_comparable(first, row.identity) for row in others)
        apart.append("; ".join(dict.fromkeys(filter(None, reasons))))
    groups = [
        Group(members, method_labels([row.recipe for row in members]), reason)
        for members, reason in zip(alike, apart, strict=True)
    ]
    return groups, left_out


def _alike(rows: list[Row]) -> list[list[Row]]:
    """The rows in lists whose members may all be compared with each other."""
    groups: list[list[Row]] = []
    for row in rows:
        for members in groups:
            if all(why_not_comparable(o.identity, row.identity) is None for o in members):
                members.append(row)
                break
        else:
            groups.append([row])
    return groups


def group_values(group: Group) -> dict[str, Any]:
    """Give a group JSON-ready: why it stands apart, its runs, means over seeds (NaN as null)."""
    runs = [
        {"method": label} | row.values()
        for row, label in zip(group.rows, group.labels, strict=True)
    ]
    means = points(group).astype(object)
    return {
        "apart": group.apart,
        "reward": group.reward,
        "utilities": group.utilities,
        "runs": runs,
        "points": means.where(means.notna(), None).to_dict("records"),
    }


def points(group: Group) -> pd.DataFrame:
    """Take seeds together: one row per method and setting, score units.

    Columns: method, setting, fixed (λ given beforehand), runs, alone (the one objective with a
    weight, or None), and by objective NAME of the group (NaN where not known): gain_NAME, low_NAME,
    high_NAME, demanded_NAME, exact_NAME and best_NAME, the exact gain of the optimal policy at
    these margins. Several runs: their mean with Student's t-interval over them, at the first run's
    confidence; one run: its own interval, clustered by prompt.
    """
    table, objectives = [], [group.reward, *group.utilities]
    labelled = list(zip(group.labels, group.rows, strict=True))
    for label in dict.fromkeys(group.labels):
        rows = [row for other, row in labelled if other == label]
        for setting in dict.fromkeys(row.setting for row in rows):
            table.append(_point(label, [r for r in rows if r.setting == setting], objectives))
    return pd.DataFrame(table)


def _point(label: str, rows: list[Row], objectives: list[str]) -> dict[str, object]:
    """One row of `points`, from runs that differ in their seed alone."""
    recipe = rows[0].recipe
    fixed = is_fixed(recipe)
    point: dict[str, object] = {
        "method": label,
        "setting": rows[0].setting,
        "fixed": fixed,
        "runs": len(rows),
        "alone": recipe.problem.reward if fixed and not is_weighted_sum(recipe) else None,
    }
    exact = [row.exact for row in rows]
    for name in objectives:
        values = zip(("gain", "low", "high"), _mean_interval(rows, name), strict=True)
        point |= {f"{key}_{name}": value for key, value in values}
        point[f"demanded_{name}"] = _mean(row.demanded.get(name) for row in rows)
        point[f"exact_{name}"] = _mean(None if e is None else e.changes.get(name) for e in exact)
        best = [None if fixed or e is None else e.best.get(name) for e in exact]
        point[f"best_{name}"] = _mean(best)
    return point


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the values, NaN where one is missing."""
    numbers = [float("nan") if value is None else value for value in values]
    return float(np.mean(numbers))


def _mean_interval(rows: list[Row], name: str) -> tuple[float, float, float]:
    changes = [row.changes[name] for row in rows if name in row.changes]
    if len(changes) < len(rows):
        return float("nan"), float("nan"), float("nan")
    if len(changes) == 1:
        return changes[0].difference, changes[0].ci_low, changes[0].ci_high
    confidence = rows[0].recipe.dual.confidence
    differences = [change.difference for change in changes]
    return float(np.mean(differences)), *t_interval(differences, confidence)


def side_by_side(group: Group, count: int) -> list[dict[str, Any]]:
    """Show the first draw of π_ref and of every run for the first `count` test prompts: prompt_id,
    prompt, and answers (who, response, scores, tokens, cut_off). π_ref's is that of the group's
    first run."""
    first = group.rows[0]
    prompts = first.run.prompts()
    prompts = prompts[prompts["split"] == "test"].head(count)
    files = [("π_ref", first, first.run.reference_file)]
    files += [(row.name, row, row.run.samples_file(row.number)) for row in group.rows]
    drawn = [(who, _first_draws(row, file, prompts["prompt_id"])) for who, row, file in files]
    return [
        {
            "prompt_id": pid,
            "prompt": last_user_text(prompt, first.recipe.prompts.format),
            "answers": [{"who": who} | answers[pid] for who, answers in drawn],
        }
        for pid, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True)
    ]


def _first_draws(row: Row, file: Path, prompt_ids: pd.Series) -> dict[str, dict[str, Any]]:
    """The first response to each prompt, by prompt_id."""
    names = row.recipe.problem.columns
    table = read_parquet(file, ["prompt_id", "response", "token_ids", "ended", *names])
    table = table[table["prompt_id"].isin(prompt_ids)].drop_duplicates("prompt_id")
    return {
        answer["prompt_id"]: {
            "response": answer["response"],
            "scores": {name: float(answer[name]) for name in names},
            "tokens": len(answer["token_ids"]),
            "cut_off": not answer["ended"],
        }
        for answer in table.to_dict("records")
    }
