"""λ_0 aims where round 0's trials aim."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.one_shot import first_multipliers
from constrained_dpo.estimates.room import required_room
from constrained_dpo.estimates.slack import slack_bounds
from constrained_dpo.estimates.verdict import look_confidence
from constrained_dpo.problem import Constraint
from constrained_dpo.run.multipliers import reference_table, seen_slack
from constrained_dpo.run.prepare import prepare
from data_prep.readers.tables import read_parquet
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

SOLVE = ["dual.method=solve", "dual.init=one_shot", "fit.conditional={}"]


def first_of(tmp_path, side: str, world):
    overrides = [*SOLVE, f"dual.confidence_side={side}", "sampling.responses_per_prompt=64"]
    return make_run(tmp_path / side / "run", world, overrides)


@pytest.mark.parametrize("constraints", [1, 2])
def test_lambda_0_meets_the_levels_and_the_room_of_pi_ref(tmp_path, constraints):
    world = random_world(3, constraints, prompts=40, responses=50)
    run, recipe, learner = first_of(tmp_path, "lower", world)
    recipe = prepare(run, recipe, learner, {})
    problem, dual = recipe.problem, recipe.dual
    reference = read_parquet(run.reference_file).query("split == 'dual'")
    place = reference.groupby("prompt_id").cumcount()
    room = required_room(
        reference[place % 2 == 0],
        reference[place % 2 == 1],
        problem,
        bounds=slack_bounds(problem, {}, seen_slack(run, problem, 0)),
        confidence=look_confidence(dual.confidence, dual.rounds, dual.rounds),
        test_prompts=20,
        responses=dual.responses_per_prompt,
    )
    assert all(0.02 < room[c.name] < c.margin for c in problem.constraints)
    raised = [replace(c, margin=c.margin + room[c.name]) for c in problem.constraints]
    aim = replace(problem, constraints=tuple(raised))
    expected = first_multipliers(reference_table(run, recipe), aim).lambda_
    np.testing.assert_allclose(pd.Series(run.state().lambda_[0]), expected, atol=1e-9)


def test_lambda_0_is_nearer_to_what_the_trials_choose_than_without_room(tmp_path):
    world = random_world(3, prompts=40, responses=50)
    run, recipe, learner = first_of(tmp_path, "lower", world)
    (record,) = play(run, recipe, learner, 1)
    other, recipe, learner = first_of(tmp_path, "none", world)
    prepare(other, recipe, learner, {})
    with_room, chosen = record.lambda_["g0"], record.lambda_next["g0"]
    without = other.state().lambda_[0]["g0"]
    assert without < with_room < 1.1 * chosen
    assert abs(np.log(with_room / chosen)) < 0.6 * abs(np.log(without / chosen))


def test_few_prompts_add_no_more_room_than_the_margin(tmp_path):
    world = random_world(3, prompts=8, responses=50)
    (margin,) = (c.margin for c in world.problem.constraints)
    run, recipe, learner = first_of(tmp_path, "lower", world)
    recipe = prepare(run, recipe, learner, {})
    twice = replace(recipe.problem, constraints=(Constraint("g0", margin=2 * margin),))
    expected = first_multipliers(reference_table(run, recipe), twice).lambda_
    np.testing.assert_allclose(pd.Series(run.state().lambda_[0]), expected, atol=1e-9)
