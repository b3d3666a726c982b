"""What is steered on, which round is chosen, when a run stops: on records, and on runs with the
exact maximizer."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.verdict import SATISFIED
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord, read_records, replay
from constrained_dpo.run.steering import (
    best_dual_round,
    best_round,
    chosen_round,
    converged,
    demanded,
    diagnose_run,
    reason_to_stop,
)
from data_prep.errors import UserError
from tests.helpers.records import round_record
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world


def test_best_is_the_highest_objective_among_rounds_satisfied_on_dual_prompts():
    values = [(-0.3, 5.0), (0.2, 1.0), (0.3, 2.0), (0.005, 4.0)]
    records = [
        round_record(t, u, objective=objective, reward=1.0 + t)
        for t, (u, objective) in enumerate(values)
    ]
    # the last one is within its error
    satisfied = [r.overall == SATISFIED for r in records]
    assert satisfied == [False, True, True, False]
    assert best_round(records, 0.95) == 2
    with pytest.raises(UserError, match="no round of 2 is satisfied on the dual prompts at 95 %"):
        best_round([records[0], records[3]], 0.95)
    # temperature ≠ 1: by reward
    assert best_round([r.model_copy(update={"objective": None}) for r in records], 0.95) == 2


def test_best_dual_is_the_smallest_value_of_the_dual_function_not_the_worst_fit():
    """The Lagrangian is smallest where the fit is worst, here in round 0."""
    values = enumerate([(2.0, 0.1), (1.5, 1.4), (1.7, 1.6)])
    records = [round_record(t, dual_value=d, lagrangian=own) for t, (d, own) in values]
    assert best_dual_round(records) == 1
    assert best_dual_round([round_record(0), *records]) == 1  # a null certificate has no value
    with pytest.raises(UserError, match="no round has a dual value"):
        best_dual_round([round_record(0)])


def settled(v=0.01, se=0.005, lam=0.5, after=0.51, objective=1.0) -> RoundRecord:
    multipliers = {"lambda": {"g": lam}, "lambda_next": {"g": after}}
    return round_record(steered_on={"g": v}, u_se={"g": se}, objective=objective, **multipliers)


def test_converged_asks_for_slackness_rest_and_the_gap():
    needed, unit = pd.Series({"g": 0.5}), pd.Series({"g": 1.0})
    ask = lambda r, gap=None, bound=None: converged(r, needed, unit, 0.05, gap, bound)
    assert ask(settled())
    assert not ask(settled(v=-0.03)) and not ask(settled(v=0.03)) and not ask(settled(after=0.6))
    assert not ask(settled(se=0.02))  # 0.01 + 0.02 is beyond 5 % of 0.5
    # complementary slackness: room is fine where λ = 0
    assert ask(settled(v=0.4, lam=0.0, after=0.0))
    assert ask(settled(), 0.2, 1.1)
    assert not ask(settled(), 0.05, 1.1) and not ask(settled(), 0.2, None)


def test_noise_alone_ends_no_run():
    """True u at −10 % of b and a standard error of 5 % of b: within six looks û alone is within
    5 % of b in 64 of 100 runs, û and its error never."""
    needed, unit = pd.Series({"g": 0.5}), pd.Series({"g": 1.0})
    estimates = np.random.default_rng(0).normal(-0.05, 0.025, size=(50, 6))
    assert (np.abs(estimates) <= 0.025).any(axis=1).mean() > 0.5
    for v in estimates.ravel():
        assert not converged(settled(v=v, se=0.025), needed, unit, 0.05, None, None)


@pytest.fixture(scope="module")
def steered_low(tmp_path_factory):
    """Four rounds that are steered on the lower bound of u, and their records."""
    world = random_world(3, 1, prompts=40, responses=50)
    settings = ["dual.confidence_side=lower", "dual.step_size=0.9"]
    run, recipe, learner = make_run(tmp_path_factory.mktemp("low") / "run", world, settings)
    play(run, recipe, learner, 4)
    return run


def test_steering_on_the_lower_bound_leaves_room_on_the_dual_prompts(steered_low):
    last = read_records(steered_low)[-1]
    assert last.steered_on["g0"] == last.u_low["g0"] < last.u["g0"]
    assert abs(last.steered_on["g0"]) < 0.03 < last.u["g0"]


def test_choices_of_a_round_by_name_and_number(steered_low):
    opened, records = RunDirectory(steered_low.path), read_records(steered_low)
    assert chosen_round(opened, "last") == 3 and chosen_round(opened, "1") == 1
    satisfied = [r for r in records if r.overall == SATISFIED]
    assert chosen_round(opened, "best") == max(satisfied, key=lambda r: r.objective).round
    lowest = int(np.argmin([r.dual_value for r in records]))
    assert chosen_round(opened, "best-dual") == lowest
    with pytest.raises(UserError, match="give a round from 0 to 3, or best, best-dual, last"):
        chosen_round(opened, "4")


def test_a_run_says_when_it_has_converged(tmp_path):
    world = random_world(3, 1, prompts=80, responses=50)
    settings = ["dual.responses_per_prompt=128", "dual.step_size=0.7", "dual.tolerance=0.2"]
    run, recipe, learner = make_run(tmp_path / "run", world, settings)
    reasons = []
    while not reasons or reasons[-1] is None:
        assert len(reasons) < 8
        (record,) = play(run, recipe, learner, 1)
        assert record.steered_on == record.u  # on no bound unless it is asked for
        reasons.append(reason_to_stop(run, recipe, True))
    assert len(reasons) > 1 and reasons[-1].startswith("converged in round ")
    assert "the constraints are met within 20 % and λ rests" in reasons[-1]
    assert reason_to_stop(run, recipe, False) is None
    needed, unit = demanded(run, recipe)
    assert needed["g0"] == pytest.approx(0.4)
    ratio = world.reward.std() / world.utilities["g0"].std()
    assert unit["g0"] == pytest.approx(ratio, rel=0.1)


def with_utilities(world: TabularWorld, **utilities: np.ndarray) -> TabularWorld:
    return TabularWorld(world.problem, world.ref_logp, world.reward, utilities)


def test_an_infeasible_margin_stops_the_run_with_the_largest_margin_that_was_seen(tmp_path):
    """A utility whose range the recipe gives: no policy gets above 1."""
    world = random_world(3, 1, prompts=40, responses=50, margin=2.0)
    world = with_utilities(world, g0=(world.utilities["g0"] > 0).astype(float))
    settings = ["objective.constraints.g0.scorer.range=[0, 1]"]
    run, recipe, learner = make_run(tmp_path / "run", world, settings)
    play(run, recipe, learner, 1)
    reason = reason_to_stop(run, recipe, False)
    assert reason.startswith("stopped after round 0: g0: infeasible") and "of 2 asked" in reason
    largest = 1 - world.evaluate(world.ref_logp).utilities["g0"]
    assert diagnose_run(run, recipe).largest["g0"] == pytest.approx(largest, abs=0.03)


def test_without_evidence_a_run_goes_on_until_its_multiplier_is_at_the_bound(tmp_path):
    world = random_world(3, 1, prompts=40, responses=50, margin=9.0)
    settings = ["dual.max_lambda=20", "dual.step_size=2"]
    run, recipe, learner = make_run(tmp_path / "run", world, settings)
    reasons = []
    while not reasons or reasons[-1] is None:
        assert len(reasons) < 6
        (record,) = play(run, recipe, learner, 1)
        reasons.append(reason_to_stop(run, recipe, False))
    assert record.lambda_["g0"] == 20.0 and len(reasons) > 1
    assert "is at dual.max_lambda 20 and violated still" in reasons[-1]
    assert "not enough evidence" in reasons[-1]


def test_a_run_with_fixed_multipliers_is_not_stopped(tmp_path):
    world = random_world(3, 1, prompts=20, responses=50, margin=9.0)
    run, recipe, learner = make_run(tmp_path / "run", world, ["dual.method=fixed"])
    (record,) = play(run, recipe, learner, 1)
    assert record.verdicts == {"g0": "violated"} and reason_to_stop(run, recipe, False) is None


def test_a_utility_equal_to_the_reward_needs_no_multiplier(tmp_path):
    world = random_world(3, 2, prompts=40, responses=50)
    same = with_utilities(world, g0=world.reward, g1=world.reward)
    run, recipe, learner = make_run(tmp_path / "run", same)
    (record,) = play(run, recipe, learner, 1)
    assert record.lambda_next == record.lambda_ == {"g0": 0.0, "g1": 0.0}


def test_two_equal_utilities_share_their_multiplier(tmp_path):
    world = random_world(3, 2, prompts=40, responses=50)
    twins = with_utilities(world, g0=world.utilities["g0"], g1=world.utilities["g0"])
    run, recipe, learner = make_run(tmp_path / "run", twins, ["dual.step_size=0.3"])
    last = play(run, recipe, learner, 3)[-1]
    assert last.lambda_["g0"] == pytest.approx(last.lambda_["g1"])
    assert abs(last.exact_on("test").u["g0"]) < 0.1


def test_at_another_temperature_the_certificate_is_null(tmp_path):
    world = random_world(5, 1, prompts=20)
    run, recipe, learner = make_run(tmp_path / "run", world, ["sampling.temperature=0.8"])
    for record in play(run, recipe, learner, 2):
        assert record.lagrangian_gap is None and record.residual is None
        assert "temperature" in record.certificate_reason
    assert not run.off_policy_file(0).exists() and replay(run) == run.state().lambda_
    with pytest.raises(UserError, match="no round has a dual value"):
        chosen_round(run, "best-dual")
