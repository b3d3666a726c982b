"""Runs whose constraints are on a tail or on a rate, with the exact maximizer."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.kinds import Measure
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.objective import ConstraintSettings
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.record import replay
from data_prep.readers.tables import read_parquet
from tests.helpers.paths import QUICKSTART
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

KINDS = {
    "tail": ({"kind": "tail", "level": 0.1, "margin": 0.4}, Measure("tail", 0.1)),
    "rate": ({"kind": "rate", "at": 0.0, "margin": 0.15}, Measure("rate", at=0.0)),
}
SCORER = {"type": "python", "target": "unused:unused"}


def run_of(path, kind: str, solved: bool):
    """A run of an enumerable world of 40 prompts whose constraint is of that kind."""
    keys, measure = KINDS[kind]
    world = random_world(5, prompts=40, responses=40)
    constraint = Constraint(f"g.{kind}", margin=keys["margin"], measure=measure)
    problem = ConstrainedProblem("r", world.problem.beta, (constraint,))
    world = replace(world, problem=problem, utilities={"g": world.utilities["g0"]})
    settings = {
        "objective.constraints": [{"name": "g", "scorer": SCORER, **keys}],
        "dual.responses_per_prompt": 128,
        "dual.init": "one_shot",
    }
    if solved:
        settings |= {"dual.method": "solve", "dual.confidence_side": "none"}
        settings |= {"fit.conditional": {"range": 3}}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return make_run(path, world, overrides), world


def test_a_round_goes_by_the_points_that_it_records(tmp_path):
    (run, recipe, learner), _ = run_of(tmp_path / "run", "tail", False)
    (record,) = play(run, recipe, learner, 1)
    assert replay(run) == run.state().lambda_
    assert run.state().tail_points == [record.tail_points, record.tail_points_next]
    assert run.recipe().problem.tail_points == record.tail_points_next
    reference = read_parquet(run.reference_file)
    assert "g" in reference and "g.tail" not in reference  # tables hold what the scorer said
    scores = recipe.at_tail_points(record.tail_points).problem.scores(run.pool(recipe, 0))
    pairs, point = read_parquet(run.pairs_file(0)), record.tail_points["g.tail"]
    lagrangian = scores["r"] + record.lambda_["g.tail"] * (
        point - np.maximum(point - scores["g"], 0.0) / 0.1
    )
    s = pd.Series(lagrangian.to_numpy(), index=scores["response_id"])
    margin = s.loc[pairs["chosen_id"]].to_numpy() - s.loc[pairs["rejected_id"]].to_numpy()
    np.testing.assert_allclose(pairs["margin"], margin, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solved", [False, True])
def test_rounds_meet_a_tail_and_a_rate(tmp_path, kind, solved):
    (run, recipe, learner), world = run_of(tmp_path / "run", kind, solved)
    records = play(run, recipe, learner, 3 if solved else 4)
    name, last = f"g.{kind}", records[-1]
    assert replay(run) == run.state().lambda_
    dual = replace(
        world,
        ref_logp=world.ref_logp[:20],
        reward=world.reward[:20],
        utilities={"g": world.utilities["g"][:20]},
    )
    best = dual.exact_optimum
    policy = dual.evaluate(learner.table(run.adapter_folder(last.round))[:20])
    assert abs(policy.u[name]) < 0.06
    assert best.share_closed(policy) == pytest.approx(1.0, abs=0.05)
    # what is measured is what is so, and what was recorded is what rounds went by
    assert last.u[name] == pytest.approx(policy.u[name], abs=0.06)
    assert last.lambda_next[name] == pytest.approx(best.lambda_[name], rel=0.25)
    points = [{**r.tail_points} for r in records] + [last.tail_points_next]
    assert run.state().tail_points == points
    if kind == "tail":
        assert points[-1][name] == pytest.approx(best.tail_points[name], abs=0.1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"level": 0.1}, "level: is of a tail, and kind is mean"),
        ({"kind": "tail", "level": 1.0}, "less than 1"),
        ({"kind": "tail", "at": 0.0}, "at: is of a rate, and kind is tail"),
        ({"kind": "rate"}, "at: kind rate needs the lowest score that counts"),
        ({"kind": "rate", "at": 0.0, "margin": "0.5std"}, "a rate's is a share, such as 0.02"),
        ({"kind": "worst"}, "'mean', 'tail' or 'rate'"),
    ],
)
def test_keys_of_another_kind_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        ConstraintSettings(**{"name": "g", "margin": 0.3, "scorer": SCORER} | keys)


def test_levels_of_an_implicit_scorer_are_refused():
    raw = yaml.safe_load(QUICKSTART.read_text())
    implicit = {"type": "implicit", "beta": 0.1, "adapter": "a"}
    raw["objective"]["constraints"] = [
        {"name": "g", "kind": "tail", "margin": 0.3, "scorer": implicit}
    ]
    with pytest.raises(ValueError, match=r"constraints\.g\.kind: an implicit scorer gives"):
        Recipe.model_validate(raw)


def test_constraints_of_every_kind_have_their_names_and_stay_out_of_the_recipes_identity():
    tail = {"name": "g", "kind": "tail", "margin": "0.5std", "scorer": SCORER}
    settings = ConstraintSettings(**tail)
    assert [c.name for c in settings.constraints] == ["g.tail"]
    assert settings.margins_in_std == {"g.tail": 0.5}
    by = ConstraintSettings(**tail, by="kind", categories={"a": ["a"], "b": ["b"]})
    assert [(c.name, c.column, c.scored) for c in by.constraints] == [
        ("g.a.tail", "g.a", "g"),
        ("g.b.tail", "g.b", "g"),
    ]
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["objective"]["constraints"] = [tail]
    recipe = Recipe.model_validate(raw)
    moved = recipe.at_tail_points({"g.tail": -1.5})
    assert moved.problem.tail_points == {"g.tail": -1.5}
    assert recipe.problem.tail_points == {}
    assert moved.hash() == recipe.hash()
