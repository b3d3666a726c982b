"""`make bench-family`: the conditional policy on enumerable worlds, with exact values.

    python -m benchmarks.bench_family runs FILE.jsonl [--worlds ...] [--seeds ...] [--scale ...]
        [--setting conditional|plain] [--two] [--lam0 4] [--kappa] [--front]
        [--categories eight|mean] [--tail] [-s KEY=VALUE ...]
    python -m benchmarks.bench_family unseen FILE.jsonl [--world pairs|syllables] [--settings ...]
        [-s KEY=VALUE ...]
    python -m benchmarks.bench_family peers FILE.jsonl [--worlds ...] [--seeds ...]
    python -m benchmarks.bench_family verdicts FILE.jsonl [--seeds ...]
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

from benchmarks.family_peers import play_peers
from benchmarks.family_runs import play_tasks
from benchmarks.family_tables import print_tables
from benchmarks.family_tasks import SCALES, SETTINGS, WORLDS, Task
from benchmarks.family_unseen import UnseenTask, play_unseen
from benchmarks.family_verdicts import play_verdicts
from benchmarks.unseen_world import WORLDS as UNSEEN


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
            categories=arguments.categories,
            tail=arguments.tail,
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
    names = ("runs", "unseen", "peers", "verdicts", "table")
    runs, unseen, peers, verdicts, table = map(commands.add_parser, names)
    for command in (runs, unseen, peers, verdicts, table):
        command.add_argument("output", type=Path)
    work = Path(tempfile.gettempdir()) / "bench-family"
    for command in (runs, unseen, peers, verdicts):
        seeds = list(range(10)) if command is verdicts else [0]
        command.add_argument("--seeds", type=int, nargs="+", default=seeds)
        command.add_argument("--work", type=Path, default=work)
    runs.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    runs.add_argument("--setting", choices=SETTINGS, default="conditional")
    runs.add_argument("--scale", choices=SCALES, default="std 1")
    runs.add_argument("--lam0", type=float, nargs="+", default=[None])
    runs.add_argument("-s", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    runs.add_argument("--categories", choices=("", "eight", "mean"), default="")
    runs.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    for option in ("two", "kappa", "front", "tail"):
        runs.add_argument(f"--{option}", action="store_true")
    for command in (runs, unseen):
        command.add_argument("--rounds", type=int, default=4)
    unseen.add_argument("-s", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    unseen.add_argument("--world", choices=UNSEEN, default="syllables")
    unseen.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    peers.add_argument("--worlds", nargs="+", choices=WORLDS, default=["embedded", "random 3"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    output = arguments.output
    if arguments.command == "table":
        print_tables([json.loads(line) for line in output.read_text().splitlines()])
    elif arguments.command == "runs":
        play_tasks(output, arguments.work, tasks_of(arguments))
    elif arguments.command == "unseen":
        world = UnseenTask(arguments.world, arguments.rounds, tuple(arguments.changes))
        play_unseen(output, arguments.work, world, arguments.settings, arguments.seeds)
    elif arguments.command == "verdicts":
        play_verdicts(output, arguments.work, arguments.seeds)
    else:
        play_peers(output, arguments.work, arguments.worlds, arguments.seeds)


if __name__ == "__main__":
    main()
