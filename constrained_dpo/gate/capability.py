"""Capability: a metric of lm-evaluation-harness before and after, from its results files.

A results file has `results` (by task `METRIC,FILTER` and `METRIC_stderr,FILTER`),
`higher_is_better`, `versions`, `n-shot` and `n-samples` by task.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constrained_dpo.gate.settings import CapabilityCheck
from data_prep.errors import UserError
from data_prep.files import read_json

SAME = ("versions", "n-shot", "n-samples")
"""What must be equal before and after, by task."""


@dataclass(frozen=True)
class Capability:
    """A metric before and after (its units) with the standard error of their difference.

    better: 1 where higher is better, −1 where lower is.
    """

    name: str
    before: float
    after: float
    se: float
    drop: float
    better: int

    @property
    def room(self) -> float:
        """By how much the metric stays above what is tolerated."""
        return self.better * (self.after - self.before) + self.drop

    @property
    def words(self) -> str:
        """The claim for a reader."""
        return f"{self.name} no worse by more than {self.drop:g} than π_ref's"


def read_capability(check: CapabilityCheck) -> Capability:
    """Read a metric from both files.

    Raises UserError for a task, a metric or a standard error that is missing, and where the two
    files are not of the same task: its version, its shots or its number of items differ.
    """
    before, after = (_content(Path(file)) for file in (check.before, check.after))
    for key in SAME:
        first, second = (content.get(key, {}).get(check.task) for content in (before, after))
        if first != second:
            raise UserError(
                f"capability {check.name}: {key} is {first} in {check.before} and {second} in "
                f"{check.after}; evaluate both in the same way"
            )
    values = [
        _value(content, check, Path(file))
        for content, file in ((before, check.before), (after, check.after))
    ]
    metric = check.metric.partition(",")[0]
    higher = before.get("higher_is_better", {}).get(check.task, {}).get(metric, True)
    return Capability(
        name=check.name,
        before=values[0][0],
        after=values[1][0],
        se=math.hypot(values[0][1], values[1][1]),
        drop=check.drop,
        better=1 if higher else -1,
    )


def _content(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content.get("results"), dict):
        raise UserError(f"{file}: no key `results`; give the results_*.json of lm-eval")
    return content


def _value(content: dict[str, Any], check: CapabilityCheck, file: Path) -> tuple[float, float]:
    """The metric and its standard error."""
    results, (metric, comma, filter_) = content["results"], check.metric.partition(",")
    if check.task not in results:
        raise UserError(f"{file}: no task {check.task}; it has {', '.join(results) or 'none'}")
    task = results[check.task]
    keys = check.metric, f"{metric}_stderr{comma}{filter_}"
    for key in keys:
        if not _is_number(task.get(key)):
            metrics = [k for k, v in task.items() if _is_number(v) and "_stderr" not in k]
            raise UserError(
                f"{file}: {check.task} has no number {key}; its metrics are {', '.join(metrics)}"
            )
    value, se = (float(task[key]) for key in keys)
    return value, se if se > 0 else _unseen_spread(content, check, value, file)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unseen_spread(
    content: dict[str, Any], check: CapabilityCheck, value: float, file: Path
) -> float:
    """The standard error where all items agree: no spread is no knowledge of the spread.

    Two successes and two failures more give a share that is not at its end (A. Agresti and
    B. Coull, The American Statistician 52, 1998).
    """
    counts = content.get("n-samples", {}).get(check.task, {})
    items = counts.get("effective") if isinstance(counts, dict) else None
    if not items or value not in (0.0, 1.0):
        raise UserError(
            f"{file}: the standard error of {check.name} is 0, which says nothing of other items; "
            "evaluate on more items"
        )
    share = (value * items + 2) / (items + 4)
    return math.sqrt(share * (1 - share) / (items + 4))
