"""Runs whose constraints are on a tail or on a rate, with the exact maximizer."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from constrained_dpo.kinds import Measure
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.run.record import replay
from data_prep.readers.tables import read_parquet
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

KINDS = {
    "tail": ({"kind": "tail", "level": 0.1, "margin": 0.4}, Measure("tail", 0.1)),
    "rate": ({"kind": "rate", "at": 0.0, "margin": 0.15}, Measure("rate", at=0.0)),
}
SOLVED = {"dual": {"method": "solve"}, "fit": {"conditional": {"range": 3}}}


def run_of(path, kind: str, solved: bool):
    """A run of an enumerable world of 60 prompts whose constraint is of that kind."""
    keys, measure = KINDS[kind]
    world = random_world(5, prompts=60, responses=60)
    constraint = Constraint(f"g.{kind}", margin=keys["margin"], measure=measure)
    problem = ConstrainedProblem("r", world.problem.beta, (constraint,))
    world = replace(world, problem=problem, utilities={"g": world.utilities["g0"]})
    settings = {"objective.constraints": [{"name": "g", "scorer": SCORER, **keys}]}
    settings |= {"dual.responses_per_prompt": 128, "dual.init": "one_shot"}
    if solved:
        settings |= {"dual.method": "solve", "dual.confidence_side": "none"}
        settings |= {"fit.conditional": {"range": 3}}
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in settings.items()]
    return make_run(path, world, [o.removesuffix("\n...") for o in overrides]), world


SCORER = {"type": "python", "target": "unused:unused"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solved", [False, True])
def test_rounds_meet_a_tail_and_a_rate(tmp_path, kind, solved):
    (run, recipe, learner), world = run_of(tmp_path / "run", kind, solved)
    records = play(run, recipe, learner, 4)
    assert replay(run) == run.state().lambda_
    half = replace(
        world,
        ref_logp=world.ref_logp[:30],
        reward=world.reward[:30],
        utilities={"g": world.utilities["g"][:30]},
    )
    name, best = f"g.{kind}", half.exact_optimum
    policy = half.evaluate(learner.table(run.adapter_folder(3))[:30])
    print(records[-1].tail_points, best.tail_points, policy.u, best.share_closed(policy), records[-1].u)
    for r in records: print(r.tail_points, r.lambda_, r.lambda_next, r.u, r.u_se)
    assert 0
