"""Runs whose constraint is by category: rounds with the exact maximizer, and a real one."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.categories import categorized
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.objective import ConstraintSettings
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.record import replay
from data_prep.errors import UserError
from data_prep.quickstart import PROMPTS
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.paths import CONDITIONAL, QUICKSTART
from tests.helpers.rounds import play
from tests.helpers.tables import random_world

KINDS = {"a": slice(0, 30), "b": slice(30, 60), "": slice(60, 80)}
MARGINS = {"a": 0.5, "default": 0.2}
SCORER = {"type": "python", "target": "unused:unused"}


def categorical_world() -> tuple[TabularWorld, pd.DataFrame]:
    """A world of 80 prompts in two categories and none, a half of each for the test."""
    world = random_world(11, prompts=80, responses=40)
    kinds = np.concatenate([[kind] * (rows.stop - rows.start) for kind, rows in KINDS.items()])
    utilities = {"g": world.utilities["g0"]} | {
        f"g.{kind}": np.where((kinds == kind)[:, None], world.utilities["g0"], np.nan)
        for kind in ("a", "b")
    }
    constraints = (Constraint("g.a", margin=0.5), Constraint("g.b", margin=0.2))
    problem = ConstrainedProblem("r", world.problem.beta, constraints)
    prompts = pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(80)],
            "prompt": "?",
            "split": np.tile(["dual", "test"], 40),
            "kind": [[kind] if kind else [] for kind in kinds],
        }
    )
    return replace(world, problem=problem, utilities=utilities), prompts


def test_rounds_with_the_exact_maximizer_meet_every_category(tmp_path, caplog):
    world, prompts = categorical_world()
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["objective"] = {
        "beta": world.problem.beta,
        "reward": {"name": "r", "scorer": SCORER},
        "constraints": [{"name": "g", "by": "kind", "margin": MARGINS, "scorer": SCORER}],
    }
    raw["dual"] = {"method": "subgradient", "rounds": 4, "responses_per_prompt": 128}
    raw["dual"] |= {"init": "one_shot", "step_size": 0.3, "prompts_per_round": 40}
    raw["fit"]["pairs_per_prompt"] = 4
    raw["sampling"]["batch_size"] = 65536
    (tmp_path / "tabular.yaml").write_text(yaml.safe_dump(raw))
    run = init_run(tmp_path / "tabular.yaml", tmp_path / "run", [])
    learner = TabularLearner(world, prompts)
    recipe = categorized(run.recipe(), prompts)
    assert "20 of 80 prompts have no category; g is not constrained on them" in caplog.text
    run.write_recipe(recipe)
    records = play(run, recipe, learner, 4)
    assert run.recipe().problem.names == ["g.a", "g.b"]  # read back from recipe.yaml
    assert replay(run) == run.state().lambda_
    last = records[-1].exact_on("test")
    right = world.exact_optimum.lambda_
    met = records[-1].exact_on("dual")
    assert all(abs(u) < 0.12 for u in met.u.values()), met.u
    assert last.objective == pytest.approx(world.exact_optimum.objective, abs=0.1)
    for name, value in records[-1].lambda_.items():
        assert value == pytest.approx(right[name], rel=0.35)
    samples = read_parquet(run.samples_file(0))
    kinds = prompts.set_index("prompt_id")["kind"]
    for kind in ("a", "b"):
        concerned = samples["prompt_id"].map(kinds).map(lambda names, k=kind: k in names)
        assert (samples[f"g.{kind}"].notna() == concerned).all()


@pytest.mark.slow
def test_a_family_of_eight_constraints_is_played_shown_and_exported(tmp_path):
    for split in ("train", "test"):
        rows = [{"prompt": p, "kind": p.split()[1:]} for p in PROMPTS[split]]  # verb and object
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    changes = [
        f"prompts.source={tmp_path}/train.jsonl",
        f"prompts.test={tmp_path}/test.jsonl",
        "objective.constraints.harmless.by=kind",
        "objective.constraints.harmless.margin={safe: 0.2, default: 0.4}",
        "objective.constraints.harmless.min_prompts=2",
        *CONDITIONAL,
    ]
    settings = [word for change in changes for word in ("-s", change)]
    run = tmp_path / "run"
    cdpo("init", QUICKSTART, run, *settings, check=0)
    cdpo("run", run, "--rounds", 1, check=0)
    recipe = load_recipe(run / "recipe.yaml")
    names = recipe.problem.names
    assert len(names) == 7 and recipe.problem.bounds["harmless.safe"] == 0.2
    record = json.loads((run / "rounds" / "000" / "round.json").read_text())
    assert set(record["exact"]["test"]["u"]) == set(names)
    samples = read_parquet(run / "rounds" / "000" / "samples.parquet")
    assert (samples[names].notna().sum(axis=1) == 2).all()  # a verb's and an object's
    cdpo("report", run, check=0)
    cdpo("status", run, "--full", check=0)
    shown = cdpo("evaluate", run, "--responses", 4, check=0).stdout
    assert all(name in shown for name in names)
    cdpo("export", run, tmp_path / "out", "--margin", "harmless.safe=0.1", check=0)
    (measured,) = (run / "front").glob("*/adapter/adapter_model.safetensors")
    assert (tmp_path / "out" / measured.name).read_bytes() == measured.read_bytes()
    again = ("export", run, tmp_path / "again", "--margin", "harmless.safe=0.1")
    shutil.rmtree(measured.parent)
    assert "adapter: is gone; remove " in cdpo(*again, check=2).stderr
    gate = tmp_path / "gate.yaml"
    benign = tmp_path / "benign.txt"  # without categories
    benign.write_text("".join(f"{prompt}\n" for prompt in PROMPTS["test"]))
    refusal = {"prompts": str(benign), "increase": 0.9, "phrases": ["sorry"]}
    gate.write_text(json.dumps({"checks": {"length": {"ratio": 3.0}, "refusal": refusal}}))
    gated = json.loads(cdpo("gate", run, gate, "--json").stdout)
    counts = {check["name"]: check["num_prompts"] for check in gated["checks"]}
    prompts = read_parquet(run / "prompts.parquet")
    tested = recipe.problem.prompt_counts(prompts)["test"]
    assert counts["harmless.safe"] == tested["harmless.safe"] < counts["length"]
    labels = tmp_path / "labels.parquet"
    weights = ("--lambda", "harmless.safe=0.4", "--reward", "helpful")
    cdpo("data", "relabel", run / "pool" / "reference.parquet", "-o", labels, *weights, check=0)


def settings_of(**changes: object) -> ConstraintSettings:
    return ConstraintSettings.model_validate({"name": "g", "scorer": SCORER} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"margin": {"a": 1.0}}, "of constraints by category; give `by` too"),
        ({"margin": 1.0, "min_prompts": 3}, "min_prompts: of constraints by category"),
        (
            {"by": "kind", "margin": {"a": 1.0}, "categories": {"a": ["a"], "b": ["b"]}},
            "no margin for b; the categories are a, b",
        ),
        (
            {"by": "kind", "margin": {"c": 1.0, "default": 0.0}, "categories": {"a": ["a"]}},
            "there is no category c",
        ),
        ({"by": "kind", "margin": {"a": "high"}}, "write a finite number"),
        ({"by": "kind", "margin": {}}, "margin: it is empty"),
        ({"by": "split", "margin": 1.0}, "by: split is a column of the prompts table"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings_of(**changes)


def test_names_in_dual_are_checked_once_the_categories_are_there():
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["objective"]["constraints"] = [{"name": "g", "by": "kind", "margin": 1.0, "scorer": SCORER}]
    raw["dual"]["init"] = {"g.a": 0.1, "g.c": 0.2}
    recipe = Recipe.model_validate(raw)  # no category is known yet
    with pytest.raises(UserError, match=r"dual\.init: lambda: unknown g\.c; missing g\.b"):
        recipe.with_categories({"g": {"a": ["a"], "b": ["b"]}})


def test_margins_in_std_are_of_the_utility_and_by_category():
    settings = settings_of(
        by="kind",
        margin={"a": "0.5std", "default": 0.3},
        categories={"a": ["a"], "other": ["b", "c"]},
    )
    assert settings.margins_in_std == {"g.a": 0.5}
    first, other = settings.model_copy(update={"reference_std": 2.0}).constraints
    assert (first.name, first.margin, first.utility) == ("g.a", 1.0, "g")
    assert (other.name, other.margin, other.categories) == ("g.other", 0.3, frozenset("bc"))
