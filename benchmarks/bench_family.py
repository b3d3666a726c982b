"""`make bench-family`: the conditional policy on enumerable worlds, with exact values.

    python -m benchmarks.bench_family runs FILE.jsonl [--worlds ...] [--seeds ...] [--scale ...]
        [--setting conditional|plain] [--two] [--lam0 4] [--kappa] [--front] [-s KEY=VALUE ...]
    python -m benchmarks.bench_family table FILE.jsonl

Records name their run; what FILE holds already is not played again, and a run that was killed goes
on from where it was (--work). A round makes 200 steps of 128 sequences; the conditional policy
samples a quarter of the policy's 256 answers a prompt after each quarter of a fit, 64 in a trial.
"""

import argparse
import itertools
import json
import logging
import tempfile
from pathlib import Path

from benchmarks.family_runs import play_tasks
from benchmarks.family_tables import print_tables
from benchmarks.family_tasks import SCALES, SETTINGS, WORLDS, Task


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """List the runs that the options name, by seed, then by world."""
    return [
        Task(
            world=world,
            seed=seed,
            setting=arguments.setting,
            scale=arguments.scale,
            two=arguments.two,
            rounds=arguments.rounds,
            lambda_0=lambda_0,
            kappa=arguments.kappa,
            front=arguments.front,
            changes=tuple(arguments.changes),
            quantization=arguments.quantization,
        )
        for seed, world, lambda_0 in itertools.product(
            arguments.seeds, arguments.worlds, arguments.lam0
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs")
    runs.add_argument("output", type=Path)
    runs.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    runs.add_argument("--seeds", type=int, nargs="+", default=[0])
    runs.add_argument("--setting", choices=SETTINGS, default="conditional")
    runs.add_argument("--scale", choices=SCALES, default="std 1")
    runs.add_argument("--rounds", type=int, default=4)
    runs.add_argument("--lam0", type=float, nargs="+", default=[None])
    runs.add_argument("-s", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    runs.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    for option in ("two", "kappa", "front"):
        runs.add_argument(f"--{option}", action="store_true")
    runs.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-family")
    commands.add_parser("table").add_argument("output", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.command == "table":
        print_tables([json.loads(line) for line in arguments.output.read_text().splitlines()])
        return
    play_tasks(arguments.output, arguments.work, tasks_of(arguments))


if __name__ == "__main__":
    main()
