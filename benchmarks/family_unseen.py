"""`bench_family unseen`: recipes on a world that no setting was chosen on, by round.

The world is an ordinary one for the product: a model folder, files of prompts, python scorers.
Exact values are computed here, from each round's adapter.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks import unseen_world
from benchmarks.family_front import values_of
from benchmarks.family_runs import row_of, row_words
from benchmarks.family_tasks import Task, recipe_of
from constrained_dpo import Run

BETA, MARGIN = 0.25, 0.5


def recipe_of_world(name: str, folder: Path, seed: int, setting: str) -> dict:
    """Write out a recipe on the unseen world: quickstart.yaml's with the setting."""
    paths = unseen_world.build(unseen_world.WORLDS[name], folder)
    recipe = recipe_of(Task("embedded", seed=seed, setting=setting))
    scorer = lambda what: {"type": "python", "target": f"{unseen_world.__file__}:{what}_{name}"}
    constraint = {"name": "g1", "margin": MARGIN, "scorer": scorer("utility")}
    recipe["policy"]["model"] = paths["model"]
    recipe["prompts"] |= {"source": paths["fit"], "test": paths["test"], "max_test": None}
    recipe["sampling"]["max_new_tokens"] = unseen_world.LENGTH
    recipe["dual"]["prompts_per_round"] = unseen_world.FIT
    recipe["objective"] = {
        "beta": BETA,
        "reward": {"name": "r", "scorer": scorer("reward")},
        "constraints": [constraint],
    }
    return recipe


@dataclass(frozen=True)
class UnseenTask:
    """A world by name, how many rounds of it, and KEY=VALUE of its recipe."""

    world: str
    rounds: int
    changes: tuple[str, ...]


def play_unseen(
    output: Path, work: Path, task: UnseenTask, settings: list[str], seeds: list[int]
) -> None:
    """Play the settings on an unseen world; one JSON line a run, none twice."""
    lines = output.read_text().splitlines() if output.exists() else []
    done = [record.get("unseen") for line in lines if (record := json.loads(line))]
    for seed in seeds:
        for setting in settings:
            name, rounds = task.world, task.rounds
            key = {"world": name, "setting": setting, "seed": seed, "rounds": rounds}
            key |= {"changes": list(task.changes)} if task.changes else {}
            if key in done:
                continue
            folder = work / "-".join(map(str, ["unseen", *key.values()])).replace("/", "_")
            recipe = recipe_of_world(name, work / f"unseen-world-{name}", seed, setting)
            result = _play(Run.create(recipe, folder, overrides=list(task.changes)), rounds)
            with output.open("a") as handle:
                handle.write(json.dumps({"unseen": key} | result) + "\n")
            shutil.rmtree(folder)


def _play(run: Run, rounds: int) -> dict:
    run.prepare()
    values, problem = values_of(run), run.recipe.problem
    best, rows = values.optimum(problem)["dual"], []
    for number in range(rounds):
        record = run.record(number) if number < run.directory.rounds_done() else run.round()
        lambda_ = pd.Series(record.policy_lambda)
        exact = values.policy(run.directory.adapter_folder(number), lambda_, problem)
        record = record.model_copy(update={"exact": exact})
        rows.append(row_of(record, best, run.directory, run.recipe) | {"verdict": record.verdict})
        print(f"  unseen round {number}: {row_words(rows[-1])}", flush=True)
    return {"lambda_star": best.lambda_, "kl_star": best.optimal.kl, "rounds": rows}
