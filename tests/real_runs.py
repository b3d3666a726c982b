"""Whole runs for the benches: each in processes of its own, on one thread."""

import json
import os
import subprocess
import sys
from pathlib import Path

CDPO = [sys.executable, "-c", "from constrained_dpo.cli import main; main()"]


def play(recipe: Path, run: Path, overrides: list[str]) -> tuple[list[dict], dict]:
    """`cdpo init` and `cdpo run`; returns round.json of every round, and exact.json. overrides: KEY=VALUE."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "check": True}
    subprocess.run([*CDPO, "init", str(recipe), str(run), *(part for s in overrides for part in ("-s", s))], **quiet)
    subprocess.run([*CDPO, "run", str(run)], **quiet)
    records = [json.loads(file.read_text()) for file in sorted(run.glob("rounds/*/round.json"))]
    return records, json.loads((run / "exact.json").read_text())
