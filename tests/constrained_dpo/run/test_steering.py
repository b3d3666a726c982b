"""What is steered on, which round is chosen, when a run stops: on records, and on runs with the
exact maximizer."""

import numpy as np
import pandas as pd
import pytest
from constrained_dpo.run.selection import (
    best_dual_round,
    best_round,
    chosen_round,
    converged,
    satisfied_on_dual,
)

from constrained_dpo.estimates.verdict import one_sided_bounds, recorded_slack
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import replay
from constrained_dpo.run.steering import demanded, diagnose_run, reason_to_stop
from data_prep.errors import UserError
from data_prep.tables import read_parquet
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world


def record(
    number: int,
    u: float,
    objective: float | None,
    lagrangian: float | None = 0.0,
    se: float = 0.01,
    **more,
) -> dict:
    base = {
        "round": number,
        "u": {"g": u},
        "u_se": {"g": se},
        "u_skew": {"g": 0.0},
        "num_prompts": 50,
        "reward": 1.0 + number,
    }
    return (
        base | {"objective": objective, "lagrangian": lagrangian, "test": {"u": {"g": -9.0}}} | more
    )


def test_best_is_the_highest_objective_among_rounds_satisfied_on_dual_prompts():
    records = [
        record(0, -0.3, 5.0),
        record(1, 0.2, 1.0),
        record(2, 0.3, 2.0),
        record(3, 0.005, 4.0),
    ]
    assert [satisfied_on_dual(r, 0.95) for r in records] == [
        False,
        True,
        True,
        False,
    ]  # the last one is within its error
    assert best_round(records, 0.95) == 2
    with pytest.raises(UserError, match="no round of 2 is satisfied on the dual prompts at 95 %"):
        best_round([records[0], records[3]], 0.95)
    without = [r | {"objective": None} for r in records]  # temperature ≠ 1: by reward
    assert best_round(without, 0.95) == 2


def test_best_dual_is_the_smallest_value_of_the_fits_own_dual_function():
    assert (
        best_dual_round(
            [record(0, 0.1, 1.0, 2.0), record(1, -0.1, 1.0, 1.5), record(2, 0.1, 1.0, 1.7)]
        )
        == 1
    )
    with pytest.raises(UserError, match="no round has a dual value"):
        best_dual_round([record(0, 0.1, None, None)])


def settled(v=0.01, lam=0.5, after=0.51, objective=1.0) -> dict:
    return {
        "steered_on": {"g": v},
        "lambda": {"g": lam},
        "lambda_next": {"g": after},
        "objective": objective,
    }


def test_converged_asks_for_slackness_rest_and_the_gap():
    needed, unit = pd.Series({"g": 0.5}), pd.Series({"g": 1.0})
    ask = lambda r, gap=None, bound=None: converged(r, needed, unit, 0.05, gap, bound)
    assert ask(settled())
    assert not ask(settled(v=-0.03)) and not ask(settled(v=0.03)) and not ask(settled(after=0.6))
    assert ask(
        settled(v=0.4, lam=0.0, after=0.0)
    )  # complementary slackness: room is fine where λ = 0
    assert (
        ask(settled(), 0.2, 1.1) and not ask(settled(), 0.05, 1.1) and not ask(settled(), 0.2, None)
    )


@pytest.mark.parametrize("m", [1, 2])
def test_runs_are_replayed_from_their_tables(tmp_path, m):
    run, recipe, learner = make_run(tmp_path / "run", random_world(5, m, prompts=20))
    records = play(run, recipe, learner, 4)
    assert {r["step"] for r in records} == {"subgradient"}
    assert replay(run) == run.state()["lambda"]
    off_policy = read_parquet(run.off_policy_file(1))
    off_policy["policy_logp"] += 1.0  # moves the residual, but not λ
    off_policy.to_parquet(run.off_policy_file(1))
    assert replay(run) == run.state()["lambda"]
    samples = read_parquet(run.samples_file(1))
    samples.loc[samples["split"] == "dual", "g0"] += 0.01
    samples.to_parquet(run.samples_file(1))
    assert replay(run) != run.state()["lambda"]


def test_steering_on_the_lower_bound_leaves_room_on_the_dual_prompts(tmp_path):
    world = random_world(3, 1, prompts=80, responses=50)
    run, recipe, learner = make_run(tmp_path / "run", world, ["dual.confidence_side=lower"])
    records = play(run, recipe, learner, 6)
    last = records[-1]
    assert (
        last["steered_on"]["g0"]
        == one_sided_bounds(recorded_slack(last), 0.95).loc["g0", "low"]
        < last["u"]["g0"]
    )
    assert abs(last["steered_on"]["g0"]) < 0.03 < last["u"]["g0"]
    plain, recipe, learner = make_run(tmp_path / "plain" / "run", world)
    assert (
        play(plain, recipe, learner, 1)[0]["steered_on"]["g0"] == plain.round_record(0)["u"]["g0"]
    )


def test_a_run_says_when_it_has_converged(tmp_path):
    world = random_world(3, 1, prompts=80, responses=50)
    settings = ["dual.responses_per_prompt=256"]
    run, recipe, learner = make_run(tmp_path / "run", world, settings)
    said = [reason_to_stop(run, recipe, True) for _ in range(8) if play(run, recipe, learner, 1)]
    assert said[0] is None and any(
        line and "the constraints are met within 5 % and λ rests" in line for line in said
    )
    assert reason_to_stop(run, recipe, False) is None
    needed, unit = demanded(run, recipe)
    assert needed["g0"] == pytest.approx(0.4) and unit["g0"] == pytest.approx(
        world.reward.std() / world.utilities["g0"].std(), rel=0.1
    )


def test_an_infeasible_margin_stops_the_run_with_the_largest_margin_that_was_seen(tmp_path):
    """A bounded utility that most responses reach: no policy gets above 1."""
    world = random_world(3, 1, prompts=80, responses=50, margin=2.0)
    world = type(world)(
        world.problem,
        world.ref_logp,
        world.reward,
        {"g0": (world.utilities["g0"] > 0).astype(float)},
    )
    run, recipe, learner = make_run(tmp_path / "run", world)
    play(run, recipe, learner, 1)
    said = reason_to_stop(run, recipe, False)
    assert said.startswith("stopped after round 0: g0: infeasible") and "of 2 asked" in said
    largest = diagnose_run(run, recipe).largest["g0"]
    assert largest == pytest.approx(1 - world.evaluate(world.ref_logp)["utilities"]["g0"], abs=0.03)


def test_without_evidence_a_run_goes_on_until_its_multiplier_is_at_the_bound(tmp_path):
    world = random_world(3, 1, prompts=80, responses=50, margin=9.0)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["dual.max_lambda=20", "dual.step_size=2"]
    )
    said = []
    while not said or said[-1] is None:
        assert len(said) < 6
        play(run, recipe, learner, 1)
        said.append(reason_to_stop(run, recipe, False))
    assert run.round_record(len(said) - 1)["lambda"]["g0"] == 20.0
    assert (
        "is at dual.max_lambda 20 and violated still" in said[-1]
        and "not enough evidence" in said[-1]
    )
    fixed, recipe, learner = make_run(tmp_path / "fixed" / "run", world, ["dual.method=fixed"])
    play(fixed, recipe, learner, 1)
    assert reason_to_stop(fixed, recipe, False) is None


def test_a_utility_equal_to_the_reward_needs_no_multiplier_and_two_equal_ones_share_it(tmp_path):
    world = random_world(3, 2, prompts=80, responses=50)
    same = type(world)(
        world.problem, world.ref_logp, world.reward, {"g0": world.reward, "g1": world.reward}
    )
    run, recipe, learner = make_run(tmp_path / "same" / "run", same)
    assert all(set(r["lambda_next"].values()) == {0.0} for r in play(run, recipe, learner, 2))
    twins = type(world)(
        world.problem,
        world.ref_logp,
        world.reward,
        {"g0": world.utilities["g0"], "g1": world.utilities["g0"]},
    )
    run, recipe, learner = make_run(tmp_path / "twins" / "run", twins)
    last = play(run, recipe, learner, 4)[-1]
    assert (
        last["lambda"]["g0"] == pytest.approx(last["lambda"]["g1"])
        and abs(last["exact"]["all"]["u"]["g0"]) < 0.1
    )


def test_at_another_temperature_the_certificate_is_null(tmp_path):
    run, recipe, learner = make_run(
        tmp_path / "run", random_world(5, 1, prompts=20), ["sampling.temperature=0.8"]
    )
    records = play(run, recipe, learner, 3)
    for r in records:
        assert (
            r["lagrangian_gap"] is None
            and r["residual"] is None
            and "temperature" in r["certificate_reason"]
        )
    assert not run.off_policy_file(0).exists() and replay(run) == run.state()["lambda"]
    with pytest.raises(UserError, match="no round has a dual value"):
        chosen_round(run, "best-dual")


def test_choices_of_a_round_by_name_and_number(tmp_path):
    world = random_world(3, 1, prompts=80, responses=50)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["dual.confidence_side=lower", "dual.step_size=1.2"]
    )
    play(run, recipe, learner, 4)
    opened = RunDirectory(run.path)
    assert chosen_round(opened, "last") == 3 and chosen_round(opened, "1") == 1
    best = opened.round_record(chosen_round(opened, "best"))
    assert satisfied_on_dual(best, 0.95)
    assert chosen_round(opened, "best-dual") == int(
        np.argmin([opened.round_record(t)["lagrangian"] for t in range(4)])
    )
    with pytest.raises(UserError, match="give a round from 0 to 3, or best, best-dual, last"):
        chosen_round(opened, "4")
