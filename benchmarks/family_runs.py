"""Runs of bench_family, played in this process with their exact values; a killed one goes on."""

import hashlib
import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.family_front import front_of, kappas_of, values_of
from benchmarks.family_tasks import Task, category_files, recipe_of, with_kinds
from benchmarks.shares import share_closed
from constrained_dpo import Run
from constrained_dpo.dual.exact import ExactOptimum
from constrained_dpo.recipe.categories import categorized
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import MORE_FITS, RunDirectory
from constrained_dpo.run.record import RoundRecord, read_optimum
from data_prep.readers.tables import read_parquet

log = logging.getLogger(__name__)


def play_tasks(output: Path, work: Path, tasks: list[Task]) -> None:
    """Play what is not in the records yet; one JSON line a run."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = output.read_text().splitlines() if output.exists() else []
    done = {
        Task.from_json(record["task"]) for line in lines if "task" in (record := json.loads(line))
    }
    for task in tasks:
        if task in done:
            continue
        name = hashlib.sha256(json.dumps(task.to_json()).encode()).hexdigest()[:12]
        result = play_task(task, work / name)
        with output.open("a") as handle:
            handle.write(json.dumps({"task": task.to_json()} | result) + "\n")
        shutil.rmtree(work / name)
        last = result["rounds"][-1]
        print(task.words(), task.world, f"seed {task.seed}", row_words(last), flush=True)


def row_words(row: dict) -> str:
    """Say what a round came to."""
    slacks = "/".join(f"{100 * value:+.1f}" for value in row["u_over_b"].values())
    seconds = sum(value or 0.0 for value in row["seconds"].values())
    return f"u {slacks} % of b, closed {100 * row['closed']:.1f} %, {seconds:.0f} s"


def play_task(task: Task, folder: Path) -> dict:
    """Play a run and read its figures: by round, and those of its last family."""
    recipe = recipe_of(task)
    if task.categories:
        recipe["prompts"] |= category_files(folder / "prompts")
    if task.lambda_0 is not None:
        optimum = _optimum(recipe, folder / "at-the-right-lambda")
        recipe["dual"]["init"] = {n: task.lambda_0 * v for n, v in optimum.lambda_.items()}
    run = Run.create(recipe, folder / "run", overrides=list(task.changes))
    run.prepare()
    best = (read_optimum(run.directory) or {})["dual"]
    started = time.perf_counter()
    for number in range(run.directory.rounds_done(), task.rounds):
        row = row_of(run.round(), best, run.directory, run.recipe)
        print(f"  {task.words()} {task.world} round {number}: {row_words(row)}", flush=True)
    records = [run.record(number) for number in range(task.rounds)]
    result = {
        "lambda_star": best.lambda_,
        "kl_star": best.optimal.kl,
        "rounds": [row_of(record, best, run.directory, run.recipe) for record in records],
        "seconds": time.perf_counter() - started,
    }
    if task.front:
        result["front"] = front_of(run, records[-1])
    if task.categories == "mean":
        result["categories"] = [categories_of(task, run, record.round) for record in records]
    if task.kappa:
        result["kappas"] = kappas_of(run, records[-1])
    return result


def categories_of(task: Task, run: Run, number: int) -> dict[str, float]:
    """Give the exact u/b that a round's policy has in each of the eight categories."""
    values = values_of(run)
    prompts = with_kinds(values.learner.prompts)
    values.learner.prompts = prompts
    eight = Recipe.model_validate(recipe_of(replace(task, categories="eight")))
    problem = categorized(eight, prompts).problem
    adapter, zero = run.directory.adapter_folder(number), pd.Series(0.0, index=problem.names)
    start = values.optimum(problem)["dual"].reference.u
    u = values.policy(adapter, zero, problem)["dual"].u
    return {name: u[name] / -start[name] for name in problem.names}


def _optimum(recipe: dict, folder: Path) -> ExactOptimum:
    run = Run.create(recipe, folder)
    run.prepare()
    return (read_optimum(run.directory) or {})["dual"]


def row_of(record: RoundRecord, best: ExactOptimum, run: RunDirectory, recipe: Recipe) -> dict:
    """Of a round's record and files what the tables are made of."""
    exact, number = record.exact_on("dual"), record.round
    fits = [a for a in range(MORE_FITS + 1) if run.family_folder(number, a).exists()]
    fit = recipe.fit.in_round(number)
    rows = round((fit.steps or 0) / recipe.stretches) * recipe.stretches
    rows *= fit.batch_size * fit.gradient_accumulation
    pool, samples = read_parquet(run.pool_file(number)), read_parquet(run.samples_file(number))
    return {
        "u_over_b": {name: u / -best.reference.u[name] for name, u in exact.u.items()},
        "measured_u_over_b": {n: u / -best.reference.u[n] for n, u in record.u.items()},
        "closed": share_closed(best, exact),
        "lagrangian_gap": exact.lagrangian_gap,
        "kl": exact.kl,
        "lambda": record.policy_lambda,
        "trials": len(record.trials or []),
        "at_edge": record.at_edge,
        "fits": max(len(fits), 1),
        "sequences": max(len(fits), 1) * rows * fit.group_size,
        "sampled": len(pool) + int(np.sum(samples["split"] == "test")),
        "seconds": record.seconds,
    }
