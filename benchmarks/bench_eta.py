"""Whether bars tell the time that is left: a run is played, and what its process says of itself is
read as `cdpo status --follow` reads it.

    python -m benchmarks.bench_eta recipes/quickstart.yaml [-s KEY=VALUE ...]

A bar's factor is the larger of claimed/true and true/claimed of the seconds left: at a tenth of
the bar's time, and the worst from there to nine tenths.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.status import read_activity

POLL = 0.05
BEGIN, END = 0.1, 0.9
SHORTEST = 1.0
"""Seconds of a bar that is worth a forecast."""


@dataclass
class Seen:
    """A bar: when it was looked at, and what it claimed to be left (seconds)."""

    begun: float
    claims: list[tuple[float, float | None]] = field(default_factory=list)
    units: int = 0
    steps: set[int] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        return self.claims[-1][0] - self.begun

    def factors(self) -> list[float | None]:
        """Of the looks between BEGIN and END of the bar's time."""
        end, factors = self.claims[-1][0], list[float | None]()
        for at, left in self.claims:
            if BEGIN <= (at - self.begun) / self.seconds <= END:
                true = end - at
                factors.append(None if left is None else max(left / true, true / max(left, 1e-3)))
        return factors


def watched(run: RunDirectory) -> list[tuple[str, Seen]]:
    """Play a run in a process of its own; return its bars by kind, in order."""
    bars: list[tuple[str, Seen]] = []
    last: tuple[str | None, str | None] = (None, None)
    program = "from constrained_dpo.cli.main import main; main()"
    words = [sys.executable, "-c", program, "run", str(run.path)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        activity, now = read_activity(run), time.monotonic()
        this = (None, None) if activity is None else (activity.phase, activity.label)
        fresh = activity is not None and bool(bars) and activity.done is not None
        if fresh and activity and activity.done < max(bars[-1][1].steps, default=0):
            last = (None, None)  # another bar of the same name
        if activity is not None and activity.label is not None:
            if this != last:
                bars.append((kind(activity.phase or "", activity.label), Seen(now)))
            bars[-1][1].claims.append((now, activity.seconds_left))
            bars[-1][1].units = activity.total or 0
            bars[-1][1].steps.add(activity.done or 0)
        last = this
        time.sleep(POLL)
    if process.returncode:
        raise SystemExit(f"cdpo run: exit code {process.returncode}")
    return bars


def kind(phase: str, label: str) -> str:
    """A phase without its round: `fit`, `trials`, `prepare: pool`."""
    name = phase.rpartition(": ")[2]
    return name if phase.startswith("round") else f"prepare, {label.partition(':')[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-s", "--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = init_run(arguments.recipe, Path(folder) / "run", arguments.overrides)
        bars = watched(run)
    by_kind: dict[str, list[Seen]] = defaultdict(list)
    for name, seen in bars:
        if len(seen.claims) > 1 and seen.seconds >= SHORTEST:
            by_kind[name].append(seen)
    print("| phase | bars | seconds | looks | without a claim | at a tenth, worst | later, worst |")
    print("|---|---|---|---|---|---|---|")
    for name, group in by_kind.items():
        each = [seen.factors() for seen in group]
        every = [factor for factors in each for factor in factors]
        claims = [factor for factor in every if factor is not None]
        early = [factors[0] for factors in each if factors and factors[0] is not None]
        seconds = "–".join(f"{f(seen.seconds for seen in group):.1f}" for f in (min, max))
        words = (f"{max(v):.2f}" if v else "none" for v in (early, claims))
        silent = len(every) - len(claims)
        print(
            f"| {name} | {len(group)} | {seconds} | {len(every)} | {silent} | {' | '.join(words)} |"
        )


if __name__ == "__main__":
    main()
