"""`make bench-peers`: one constraint, met by the conditional policy and by its peers, at equal
passes, with exact values.

    python -m benchmarks.bench_peers runs FILE.jsonl [--peers ...] [--worlds ...] [--seeds ...]
        [--scale "std 1"|"std 10"] [--steps 800] [--rate RATE] [--work FOLDER]
    python -m benchmarks.bench_peers table FILE.jsonl

Every peer trains on 800 steps of 128 sequences and is set to draw no more samples than the
conditional run does. A weighted sum plays four weights, each with as many passes; the table counts
all of them, and shows beside it the four at a quarter each. What FILE holds already is not played
again.
"""

import argparse
import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.family_front import values_of
from benchmarks.family_tasks import SCALES, WORLDS
from benchmarks.peers_grpo import play_grpo
from benchmarks.peers_preferences import PeerTask, play_modpo, play_safedpo
from benchmarks.peers_tables import WEIGHTED, print_tables
from benchmarks.shares import share_closed
from constrained_dpo import Run
from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy
from constrained_dpo.recipe.methods import method_overrides
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.record import RoundRecord, read_optimum
from data_prep.quiet import quiet_libraries
from data_prep.readers.tables import read_parquet

WEIGHTS = (0.25, 0.5, 1.0, 2.0)
DELTAS = (0.0, 10.0)  # of SafeDPO
OFFLINE = "sampling.responses_per_prompt=1024"  # a fixed pool is as large as the samples allow
PAPERS = ("fit.learning_rate=2e-4", OFFLINE)
LEVEL = "sampling.responses_per_prompt=512"  # π_ref's level as sure as the conditional run's
PREFERENCE_RATE, GRPO_RATE, DUAL_RATE = 2e-4, 1e-3, 0.02


def play_run(setting: str, method: str | None, task: PeerTask, folder: Path) -> dict:
    """Play four rounds of a `Run`: a setting of bench_family, as it is or by a paper's method."""
    recipe, overrides = task.recipe(setting), []
    if method is not None:
        overrides = [*PAPERS, *method_overrides(method, Recipe.model_validate(recipe))]
    overrides += [] if task.rate is None else [f"fit.learning_rate={task.rate}"]
    return _played(Run.create(recipe, folder, overrides), task)


def play_weighted(weight: float, task: PeerTask, folder: Path) -> dict:
    """Play four rounds at a fixed λ."""
    recipe = task.recipe()
    names = [constraint["name"] for constraint in recipe["objective"]["constraints"]]
    recipe["dual"] |= {"method": "fixed", "init": dict.fromkeys(names, weight)}
    recipe["fit"] |= {} if task.rate is None else {"learning_rate": task.rate}
    return _played(Run.create(recipe, folder), task)


def _played(run: Run, task: PeerTask) -> dict:
    run.prepare()
    best = _best(run)
    started = time.process_time()
    records = [run.round() for _ in range(task.steps // task.budget.look)]
    seconds = time.process_time() - started
    fits = sum(_fits(run, record.round) for record in records)
    return {
        "rows": [
            row_of((number + 1) * task.budget.look, best, record.exact["dual"])
            | {"lambda": record.policy_lambda}
            for number, record in enumerate(records)
        ],
        **world_of(best),
        "sequences": fits * task.budget.look * task.budget.sequences,
        "reference_draws": (reference := _reference_draws(run)),
        "sampled": reference + sum(_draws(run, record) for record in records),
        "seconds": seconds,
    }


def _best(run: Run) -> ExactOptimum:
    return (read_optimum(run.directory) or {})["dual"]


def _fits(run: Run, number: int) -> int:
    """Fits of a round: a family that does not answer λ is fitted further."""
    folders = [run.directory.family_folder(number, attempt) for attempt in range(10)]
    return max(sum(folder.exists() for folder in folders), 1)


def _reference_draws(run: Run) -> int:
    files = (run.directory.pool_file(None), run.directory.reference_file)
    return sum(len(read_parquet(file)) for file in files)


def _draws(run: Run, record: RoundRecord) -> int:
    """Samples of a round's policy: those that joined the pool, and those on the test prompts."""
    samples = read_parquet(run.directory.samples_file(record.round))
    grown = run.directory.pool_file(record.round)
    if not grown.exists():
        return len(samples)
    return len(read_parquet(grown)) + int((samples["split"] == "test").sum())


def play_other(play: Callable[[Run, PeerTask], dict], task: PeerTask, folder: Path) -> dict:
    """Play a peer that is no `Run`, on a prepared one's samples of π_ref, and value its looks."""
    run = Run.create(task.recipe(), folder, [LEVEL if play is _grpo else OFFLINE])
    run.prepare()
    best, result = _best(run), play(run, task)
    adapters = result.pop("adapters")
    multipliers = result.pop("lambda", {})
    values, problem = values_of(run), run.recipe.problem
    world = values.world("dual", problem)
    at = pd.Series(best.lambda_)
    rows = [
        row_of(step, best, world.evaluate(values.logps("dual", adapter), at))
        | {"lambda": multipliers.get(step)}
        for step, adapter in adapters.items()
    ]
    return {"rows": rows} | world_of(best) | result


def _grpo(run: Run, task: PeerTask) -> dict:
    return play_grpo(run, task.budget, task.rate or GRPO_RATE, DUAL_RATE)


def _modpo(run: Run, task: PeerTask) -> dict:
    ((_, lambda_),) = _best(run).lambda_.items()
    return play_modpo(run, lambda_, task.budget, task.rate or PREFERENCE_RATE)


def _safedpo(delta: float, run: Run, task: PeerTask) -> dict:
    return play_safedpo(run, delta, task.budget, task.rate or PREFERENCE_RATE)


PEERS: dict[str, Callable[[PeerTask, Path], dict]] = {
    "conditional": partial(play_run, "conditional", None),
    "CAID's steps, our fits": partial(play_run, "plain", None),
    "CAID": partial(play_run, "plain", "caid"),
    "MoCAN": partial(play_run, "plain", "mocan"),
    **{f"{WEIGHTED} {weight:g}": partial(play_weighted, weight) for weight in WEIGHTS},
    **{f"SafeDPO, Δ {delta:g}": partial(play_other, partial(_safedpo, delta)) for delta in DELTAS},
    "MODPO at λ*": partial(play_other, _modpo),
    "GRPO, λ by dual ascent": partial(play_other, _grpo),
}


def world_of(best: ExactOptimum) -> dict:
    """What of the world the tables need: λ*, the way of the objective from π_ref's to P*, b."""
    ((name, u),) = best.reference.u.items()
    gap = best.objective - best.reference.objective
    return {"lambda_star": best.lambda_[name], "gap": gap, "margin": -u}


def row_of(steps: int, best: ExactOptimum, policy: ExactPolicy) -> dict:
    """Exact figures of the policy after so many steps."""
    ((name, u),) = policy.u.items()
    closed, slack = share_closed(best, policy), u / -best.reference.u[name]
    return {"steps": steps, "closed": closed, "u_over_b": slack, "kl": policy.kl}


def play_peers(output: Path, work: Path, tasks: list[PeerTask]) -> None:
    """Play what is not in the records yet; one JSON line a run."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = output.read_text().splitlines() if output.exists() else []
    done = [PeerTask(**json.loads(line)["task"]) for line in lines]
    for task in tasks:
        if task in done:
            continue
        folder = work / "-".join(map(str, asdict(task).values())).replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        result = PEERS[task.peer](task, folder)
        with output.open("a") as handle:
            handle.write(json.dumps({"task": asdict(task)} | result) + "\n")
        shutil.rmtree(folder)
        last = result["rows"][-1]
        figures = f"closed {100 * last['closed']:.1f} %, u {100 * last['u_over_b']:+.1f} % of b"
        print(f"{task.peer}, {task.world}: {figures}, {result['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs, table = commands.add_parser("runs"), commands.add_parser("table")
    for command in (runs, table):
        command.add_argument("output", type=Path)
    runs.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    runs.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    runs.add_argument("--seeds", type=int, nargs="+", default=[0])
    runs.add_argument("--scale", choices=SCALES, default="std 1")
    runs.add_argument("--steps", type=int, default=800)
    runs.add_argument("--rate", type=float, help="learning rate in place of each peer's own")
    runs.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-peers")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print_tables([json.loads(line) for line in arguments.output.read_text().splitlines()])
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_libraries()
    order = itertools.product(arguments.seeds, arguments.worlds, arguments.peers)
    scale, steps, rate = arguments.scale, arguments.steps, arguments.rate
    tasks = [PeerTask(p, w, s, scale, steps, rate) for s, w, p in order]
    play_peers(arguments.output, arguments.work, tasks)


if __name__ == "__main__":
    main()
