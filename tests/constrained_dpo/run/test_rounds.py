"""The loop with the exact maximizer as its learner: convergence to λ*, resuming, replaying. No
network, real files."""

import shutil
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.verdict import look_confidence
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import replay
from constrained_dpo.run.rounds import play_round
from data_prep.readers.tables import read_parquet, write_parquet
from tests.helpers.rounds import NUM_PROMPTS, make_run, play, tables_of
from tests.helpers.tables import random_world


def test_rounds_with_the_exact_maximizer_reach_the_constraints(tmp_path):
    """Two of them; with one, `test_a_run_says_when_it_has_converged`."""
    world = random_world(3, 2, prompts=NUM_PROMPTS, responses=50)
    run, recipe, learner = make_run(tmp_path / "run", world, ["dual.step_size=0.4"])
    records = play(run, recipe, learner, 4)
    assert records[0].lambda_ == dict.fromkeys(world.problem.names, 0.0)
    first, last = (record.exact_on("test") for record in (records[0], records[-1]))
    assert max(abs(u) for u in first.u.values()) > 1
    assert all(abs(u) < 0.12 for u in last.u.values())
    assert last.objective == pytest.approx(world.optimum.dual_value, abs=0.06)


def test_one_shot_init_is_near_the_exact_multipliers(tmp_path):
    world = random_world(4, 2, prompts=2 * NUM_PROMPTS, responses=50, beta=1.0)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["dual.init=one_shot", "sampling.responses_per_prompt=400"]
    )
    prepare(run, recipe, learner, {})
    first = pd.Series(run.state().lambda_[0])
    pd.testing.assert_series_equal(first, world.optimum.lambda_, atol=0.25, check_names=False)


def change(table, **columns) -> None:
    """Adds to columns of a run's table on the dual prompts."""
    frame = read_parquet(table)
    rows = frame["split"] == "dual" if "split" in frame else slice(None)
    for column, value in columns.items():
        frame.loc[rows, column] += value
    frame.to_parquet(table)


@pytest.mark.parametrize("method", ["subgradient", "one_shot", "fixed"])
def test_replay_recomputes_lambda_and_notices_a_changed_table(tmp_path, method):
    run, recipe, learner = make_run(
        tmp_path / "run", random_world(5, 2, prompts=20), [f"dual.method={method}"]
    )
    records = play(run, recipe, learner, 2 if method == "subgradient" else 1)
    lambdas = run.state().lambda_
    assert replay(run) == lambdas
    if method != "subgradient":
        assert {r.step for r in records} == {"kept"} and lambdas[0] == lambdas[1]
        return
    assert {r.step for r in records} == {"subgradient"} and lambdas[0] != lambdas[1]
    for table, column in ((run.off_policy_file(1), "policy_logp"), (run.samples_file(1), "g0")):
        change(table, **{column: 0.01})  # both are estimated from
        assert replay(run) != lambdas
        change(table, **{column: -0.01})


def test_every_round_is_one_look_and_says_what_its_bounds_rest_on(tmp_path):
    """g0 has a range in the recipe, g1 has none: its bounds are what the run has seen, in any
    round."""
    world = random_world(5, 2, prompts=20)
    utility = np.clip(world.utilities["g0"], -2.0, 2.0)
    world = TabularWorld(
        world.problem, world.ref_logp, world.reward, world.utilities | {"g0": utility}
    )
    settings = ["dual.rounds=3", "objective.constraints.g0.scorer.range=[-2, 2]"]
    run, recipe, learner = make_run(tmp_path / "run", world, settings)
    records = play(run, recipe, learner, 4)
    looks = [look_confidence(0.95, look, 3) for look in (1, 2, 3, 4)]
    assert [r.test.verdict_confidence for r in records] == looks
    assert [r.verdict_confidence for r in records] == [0.95] * 4  # of dual prompts: no verdict
    seen = []
    for record in records:
        assert record.test.bounds_seen == ["g1"]
        margin = recipe.problem.bounds["g0"]
        assert record.test.u_bounds["g0"] == (-4.0 - margin, 4.0 - margin)
        seen.append(record.test.u_bounds["g1"])
    assert all(b[0] <= a[0] and b[1] >= a[1] for a, b in pairwise(seen)) and len(set(seen)) > 1


PHASES = ["state", "round.json", "samples.parquet", "adapter", "pairs.parquet"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two rounds, with its state before the last one's dual step."""
    world = random_world(6, 1, prompts=20)
    run, recipe, learner = make_run(tmp_path_factory.mktemp("whole") / "run", world)
    play(run, recipe, learner, 1)
    before = run.state()
    play(run, recipe, learner, 1)
    return run, learner, before


@pytest.mark.parametrize("lost", [*PHASES, "shards"])
def test_a_round_resumed_from_any_phase_equals_an_uninterrupted_one(tmp_path, whole, lost):
    """The dual step's commit is lost, and everything from the named phase on."""
    uncut, learner, before = whole
    shutil.copytree(uncut.path, tmp_path / "run")
    cut = type(uncut)(tmp_path / "run")
    cut.write_state(before)
    samples = read_parquet(cut.samples_file(1)).drop(columns="split")
    shard = cut.shard_folder("round-001") / "00000.parquet"
    write_parquet(samples, shard)  # not yet cleaned up
    names = PHASES[1:2] if lost == "shards" else PHASES[1 : PHASES.index(lost) + 1]
    for name in names:
        path = cut.round_folder(1) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if lost == "shards":  # killed between two shards: the first is committed, the second is not
        cut.pool_file(1).unlink()
        cut.samples_file(1).unlink()
        per_shard = cut.recipe().sampling.batch_size // 64 * 64
        write_parquet(samples.head(per_shard), shard)
    play(cut, cut.recipe(), learner, 1)
    assert tables_of(cut) == tables_of(uncut) and not list(cut.path.rglob("shards/*/*"))


def test_pool_grows_by_the_dual_prompts_samples_only(whole):
    run, learner, _ = whole
    pool = run.pool(run.recipe(), 2)
    dual = set(learner.prompts["prompt_id"][learner.prompts["split"] == "dual"])
    assert set(pool["prompt_id"]) == dual
    assert set(pool["source"]) == {"reference-pool", "round:0", "round:1"}


def test_a_pool_that_does_not_grow_keeps_to_the_reference(tmp_path):
    world = random_world(7, 1, prompts=20)
    run, recipe, learner = make_run(tmp_path / "run", world, ["pool.grow=false"])
    play(run, recipe, learner, 1)
    assert set(run.pool(run.recipe(), 1)["source"]) == {"reference-pool"}


def test_prompts_without_a_pair_are_counted(tmp_path, caplog):
    """Three prompts of the pool have one response each (as of a dataset); in the next round they
    have samples of the first."""
    run, recipe, learner = make_run(tmp_path / "run", random_world(7, 1, prompts=20))
    recipe = prepare(run, recipe, learner, {})
    pool = read_parquet(run.pool_file(None))
    few = pool["prompt_id"].isin(sorted(set(pool["prompt_id"]))[:3]) & pool.duplicated("prompt_id")
    write_parquet(pool[~few], run.pool_file(None))
    first, second = (play_round(run, recipe, learner) for _ in range(2))
    assert first.unlabelled_prompts == 3 and second.unlabelled_prompts == 0
    lines = [line for line in caplog.messages if "nothing to compare" in line]
    assert lines == ["round 0: 3 of 10 prompts have nothing to compare and no part in the fit"]


def test_no_constraints_is_single_reward_dpo(tmp_path):
    world = random_world(8, 0, prompts=20)
    run, recipe, learner = make_run(tmp_path / "run", world)
    (record,) = play(run, recipe, learner, 1)
    assert record.lambda_ == {} and record.verdict == "satisfied"
    assert record.exact_on("test").objective == pytest.approx(world.optimum.dual_value)
