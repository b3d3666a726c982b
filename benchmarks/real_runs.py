"""Whole runs for the benches: each in a process of its own, on one thread, forked from a server
that has imported the libraries once."""

import json
import multiprocessing
import os
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from constrained_dpo.cli.main import main

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below; the bench itself computes nothing
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["constrained_dpo.cli.main", "constrained_dpo.fit.trainer", "constrained_dpo.learners.lora"]
)


def play(
    recipe: Path, run: Path, overrides: list[str], start_from: Path | None = None
) -> tuple[list[dict], dict | None]:
    """`cdpo init` and `cdpo run`; returns round.json of every round, and exact.json (None: not
    enumerable).

    overrides: KEY=VALUE. start_from: a run whose reference samples serve this one too.
    """
    shared = ["--from", str(start_from)] if start_from else []
    init = [
        "init",
        str(recipe),
        str(run),
        *shared,
        *(part for s in overrides for part in ("-s", s)),
    ]
    process = PROCESSES.Process(target=_commands, args=([init, ["run", str(run)]],))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"cdpo init or run of {run} exited with {process.exitcode}")
    records = [json.loads(file.read_text()) for file in sorted(run.glob("rounds/*/round.json"))]
    exact = run / "exact.json"
    return records, json.loads(exact.read_text()) if exact.exists() else None


def _commands(commands: list[list[str]]) -> None:
    """The commands one after the other in this process, quietly; exits at the first that fails, and
    with the bench that started it."""
    threading.Thread(target=_end_with_the_bench, daemon=True).start()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for arguments in commands:
            sys.argv = ["cdpo", *arguments]
            try:
                main()
            except SystemExit as stopped:
                if stopped.code:
                    raise


def _end_with_the_bench() -> None:
    """Ends this process when the bench is gone, also by kill -9: the server that forked it would
    let it go on."""
    multiprocessing.parent_process().join()
    os._exit(1)
