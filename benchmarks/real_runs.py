"""Whole runs for the benchmarks: each in a process of its own, on one thread, forked from a
server that has imported the libraries once."""

import multiprocessing
import os
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from constrained_dpo.cli.main import main
from constrained_dpo.dual.exact import ExactOptimum
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord, read_optimum, read_records

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below; the benchmark itself computes nothing
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["constrained_dpo.cli.main", "constrained_dpo.fit.trainer", "constrained_dpo.learners.lora"]
)


def play(
    recipe: Path, run: Path, overrides: list[str], start_from: Path | None = None
) -> tuple[list[RoundRecord], dict[str, ExactOptimum] | None]:
    """`cdpo init` and `cdpo run`; returns the record of every round, and the exact optimum by split
    (None: not enumerable).

    overrides: KEY=VALUE. start_from: a run whose reference samples serve this one too.
    """
    shared = ["--from", str(start_from)] if start_from else []
    init = [
        "init",
        str(recipe),
        str(run),
        *shared,
        *(word for override in overrides for word in ("-s", override)),
    ]
    process = PROCESSES.Process(target=_commands, args=([init, ["run", str(run)]],))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"cdpo init or run of {run} exited with {process.exitcode}")
    directory = RunDirectory(run)
    return read_records(directory), read_optimum(directory)


def _commands(commands: list[list[str]]) -> None:
    """The commands one after the other in this process, quietly; exits at the first that fails, and
    with the benchmark that started it."""
    threading.Thread(target=_end_with_the_benchmark, daemon=True).start()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for arguments in commands:
            sys.argv = ["cdpo", *arguments]
            try:
                main()
            except SystemExit as stopped:
                if stopped.code:
                    raise


def _end_with_the_benchmark() -> None:
    """Ends this process when the benchmark is gone, also by kill -9: the server that forked it
    would let it go on."""
    multiprocessing.parent_process().join()
    os._exit(1)
