"""A run of an enumerable world, played by the exact maximizer."""

import json

import pandas as pd
import yaml

from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.rounds import play_round
from data_prep.readers.tables import read_parquet
from tests.helpers.paths import QUICKSTART

NUM_PROMPTS = 40


def make_run(path, world, overrides=()) -> tuple[RunDirectory, Recipe, TabularLearner]:
    raw = yaml.safe_load(QUICKSTART.read_text())
    scorer = {"type": "python", "target": "unused:unused"}
    raw["objective"] = {
        "beta": world.problem.beta,
        "reward": {"name": "r", "scorer": dict(scorer)},
        "constraints": [
            {"name": c.name, "margin": c.margin, "scorer": dict(scorer)}
            for c in world.problem.constraints
        ],
    }
    raw["dual"] = {
        "method": "subgradient",
        "rounds": 5,
        "responses_per_prompt": 64,
        "init": "zeros",
        "prompts_per_round": NUM_PROMPTS,
        "step_size": 0.5,
    }
    raw["fit"]["pairs_per_prompt"] = 4
    raw["sampling"]["batch_size"] = 65536  # one shard: nothing is generated
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe_file = path.parent / "tabular.yaml"
    recipe_file.write_text(yaml.safe_dump(raw))
    run = init_run(recipe_file, path, list(overrides))
    half = len(world.reward) // 2
    prompts = pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(2 * half)],
            "prompt": "?",
            "split": ["dual"] * half + ["test"] * half,
        }
    )
    return run, run.recipe(), TabularLearner(world, prompts)


def play(run, recipe, learner, rounds) -> list[RoundRecord]:
    recipe = run.recipe() if run.state().prepared else prepare(run, recipe, learner, {})
    return [play_round(run, recipe, learner) for _ in range(rounds)]


def tables_of(run) -> dict[str, pd.DataFrame | str]:
    files = sorted(run.path.rglob("*.parquet"))
    content = {str(f.relative_to(run.path)): read_parquet(f).to_json() for f in files}
    return content | {"lambda": json.dumps(run.state().lambda_)}
