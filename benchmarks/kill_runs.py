"""The runs that kill_many.py pulls the plug of, one that nothing stopped, and what happened to
them."""

import collections
import subprocess
import sys
import time
from pathlib import Path

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from tests.helpers.paths import QUICKSTART
from tests.helpers.wrecks import Server, alive, content, phase

SMALL = [
    "sampling.responses_per_prompt=8",
    "dual.responses_per_prompt=8",
    "sampling.batch_size=64",
    "fit.steps=30",
    "dual.rounds=2",
]


def new_run(path: Path, exact: bool) -> RunDirectory:
    """A fresh run directory; without `exact`, the world's policy is named by its folder, as any
    other model is."""
    code = "from data_prep.quickstart import build_policy; print(build_policy())"
    model = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    return init_run(QUICKSTART, path, SMALL if exact else [*SMALL, f"policy.model={model}"])


def reference_run(
    folder: Path, exact: bool
) -> tuple[dict[str, str], list[tuple[tuple[int, str], float]], float]:
    """Content of a run that nothing stopped, its phases with the second each began at, and its wall
    time."""
    run, server = new_run(folder / "reference", exact), Server(folder)
    start, phases = time.time(), []
    pid = server.start("run", run.path)
    while alive(pid):
        if not phases or phase(run) != phases[-1][0]:
            phases.append((phase(run), time.time() - start))
        time.sleep(0.01)
    status, seconds = server.wait(), time.time() - start
    server.close()
    if status != 0:
        sys.exit(f"the uninterrupted run ended with {status}: {server.log.read_text()}")
    print(f"uninterrupted: {seconds:.1f} s, {len(content(run))} results; began at", flush=True)
    print(", ".join(f"{name} {number}: {at:.1f}" for (number, name), at in phases), flush=True)
    return content(run), phases, seconds


class Tally:
    """What happened, for the table at the end."""

    def __init__(self) -> None:
        self.phases, self.inside, self.failures = collections.Counter(), collections.Counter(), []
        self.counts = collections.Counter(
            dict.fromkeys(
                ("stale locks", "half files", "differences", "leftovers", "failed resumes"), 0
            )
        )

    def fail(self, kind: str, what: list[str]) -> None:
        self.counts[kind] += len(what)
        self.failures += [f"{kind}: {w}" for w in what]
        for line in what:
            print(f"FAILED {kind}: {line}", flush=True)

    def report(self, title: str) -> int:
        print(f"\n{title}")
        rows = {**self.counts, **{f"in {k}": v for k, v in sorted(self.phases.items())}}
        rows |= {f"with a half-written {k}": v for k, v in sorted(self.inside.items())}
        for name, number in rows.items():
            print(f"  {name:<45} {number:>5}")
        print("\n".join(self.failures) or "no failure")
        return 1 if self.failures else 0
