"""The loop with the exact maximizer as its learner: convergence to λ*, resuming, replaying,
refusing. No network, real files."""

import multiprocessing
import shutil

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare, require_same_inputs
from constrained_dpo.run.record import replay
from constrained_dpo.run.rounds import play_round
from data_prep.errors import UserError
from data_prep.tables import read_parquet, write_parquet
from tests.helpers.rounds import NUM_PROMPTS, make_run, play, tables_of
from tests.helpers.tables import random_world


@pytest.mark.parametrize("m", [1, 2])
def test_rounds_with_the_exact_maximizer_reach_the_constraint(tmp_path, m):
    world = random_world(3, m, prompts=2 * NUM_PROMPTS, responses=50)
    run, recipe, learner = make_run(tmp_path / "run", world)
    records = play(run, recipe, learner, 15)
    exact = records[-1]["exact"]["all"]
    assert all(abs(u) < 0.12 for u in exact["u"].values())
    assert exact["objective"] == pytest.approx(world.optimum.dual_value, abs=0.06)
    assert records[0]["lambda"] == dict.fromkeys(world.problem.names, 0.0)


def test_one_shot_init_is_near_the_exact_multipliers(tmp_path):
    world = random_world(4, 2, prompts=2 * NUM_PROMPTS, responses=50, beta=1.0)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["dual.init=one_shot", "sampling.responses_per_prompt=400"]
    )
    prepare(run, recipe, learner, {})
    found = pd.Series(run.state()["lambda"][0])
    pd.testing.assert_series_equal(found, world.optimum.lambda_, atol=0.25, check_names=False)


@pytest.mark.parametrize("method", ["subgradient", "one_shot", "fixed"])
def test_replay_recomputes_lambda_and_notices_a_changed_table(tmp_path, method):
    run, recipe, learner = make_run(
        tmp_path / "run", random_world(5, 2, prompts=20), [f"dual.method={method}"]
    )
    play(run, recipe, learner, 3)
    assert replay(run) == run.state()["lambda"]
    state = run.state()
    assert (state["lambda"][0] == state["lambda"][3]) == (method != "subgradient")
    if method == "subgradient":
        samples = read_parquet(run.samples_file(1))
        samples.loc[samples["split"] == "dual", "g0"] += 0.01
        samples.to_parquet(run.samples_file(1))
        assert replay(run) != run.state()["lambda"]


@pytest.mark.parametrize(
    "lost", ["state", "round.json", "samples.parquet", "adapter", "pairs.parquet", "shards"]
)
def test_a_round_resumed_from_any_phase_equals_an_uninterrupted_one(tmp_path, lost):
    world = random_world(6, 1, prompts=20)
    whole, recipe, learner = make_run(tmp_path / "a" / "run", world)
    play(whole, recipe, learner, 3)
    cut, recipe, learner = make_run(tmp_path / "b" / "run", world)
    play(cut, recipe, learner, 2)
    before = cut.state()
    play(cut, recipe, learner, 1)
    write_parquet(
        read_parquet(cut.samples_file(2)).drop(columns="split"),
        cut.shard_folder("round-002") / "00000.parquet",
    )  # not yet cleaned up
    cut.write_state(
        before
    )  # the dual step's commit is lost, and everything from the named phase on
    order = ["state", "round.json", "samples.parquet", "adapter", "pairs.parquet"]
    for name in order[1 : order.index(lost) + 1] if lost != "shards" else ["round.json"]:
        path = cut.round_folder(2) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if lost == "shards":  # killed between two shards: the first is committed, the second is not
        cut.pool_file(2).unlink()
        samples = read_parquet(cut.samples_file(2)).drop(columns="split")
        cut.samples_file(2).unlink()
        write_parquet(
            samples.head(recipe.sampling.batch_size // 64 * 64),
            cut.shard_folder("round-002") / "00000.parquet",
        )
    play(cut, recipe, learner, 1)
    assert tables_of(cut) == tables_of(whole) and not list(cut.path.rglob("shards/*/*"))


def test_pool_grows_by_the_dual_prompts_samples_only(tmp_path):
    run, recipe, learner = make_run(tmp_path / "run", random_world(7, 1, prompts=20))
    play(run, recipe, learner, 2)
    pool = run.pool(2)
    dual = set(learner.prompts["prompt_id"][learner.prompts["split"] == "dual"])
    assert set(pool["prompt_id"]) == dual and set(pool["source"]) == {
        "reference-pool",
        "round:0",
        "round:1",
    }
    fixed, recipe, learner = make_run(
        tmp_path / "fixed" / "run", random_world(7, 1, prompts=20), ["pool.grow=false"]
    )
    play(fixed, recipe, learner, 2)
    assert set(fixed.pool(2)["source"]) == {"reference-pool"}


def test_prompts_without_a_pair_are_counted(tmp_path, capsys):
    """Three prompts of the pool have one response each (as of a dataset); in the next round they
    have samples of the first."""
    run, recipe, learner = make_run(tmp_path / "run", random_world(7, 1, prompts=20))
    recipe = prepare(run, recipe, learner, {})
    pool = read_parquet(run.pool_file(None))
    few = pool["prompt_id"].isin(sorted(set(pool["prompt_id"]))[:3]) & pool.duplicated("prompt_id")
    write_parquet(pool[~few], run.pool_file(None))
    first, second = (play_round(run, recipe, learner) for _ in range(2))
    assert first["unlabelled_prompts"] == 3 and "unlabelled_prompts" not in second
    said = [line for line in capsys.readouterr().err.splitlines() if "nothing to compare" in line]
    assert said == ["round 0: 3 of 10 prompts have nothing to compare and no part in the fit"]


def test_no_constraints_is_single_reward_dpo(tmp_path):
    world = random_world(8, 0, prompts=20)
    run, recipe, learner = make_run(tmp_path / "run", world)
    record = play(run, recipe, learner, 1)[0]
    assert record["lambda"] == {} and record["verdict"] == "satisfied"
    assert record["exact"]["all"]["objective"] == pytest.approx(world.optimum.dual_value)


def hold(path, ready, release):
    with RunDirectory(path).locked():
        ready.set()
        release.wait(30)


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    run, _, _ = make_run(tmp_path / "run", random_world(9))
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(run.path, ready, release))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"worked on by process {process.pid}"), run.locked():
        pass
    process.kill()
    process.join()
    with run.locked():
        assert (run.path / ".holder").read_text().startswith("process")


def test_half_made_files_are_swept_under_the_lock(tmp_path):
    run, _, _ = make_run(tmp_path / "run", random_world(9))
    (run.path / "pool").mkdir()
    (run.path / "pool" / ".reference.parquet.77.tmp").write_text("half")
    (run.path / "rounds" / "000" / ".adapter.tmp").mkdir(parents=True)
    with run.locked():
        assert not list(run.path.rglob(".*.tmp"))


def test_other_recipes_edited_recipes_changed_inputs_and_old_versions_are_refused(tmp_path):
    world = random_world(10)
    run, recipe, learner = make_run(tmp_path / "run", world)
    make_run(tmp_path / "run", world)  # the same again is no error
    with pytest.raises(UserError, match="run of another recipe"):
        make_run(tmp_path / "run", world, ["seed=5"])
    prepare(run, recipe, learner, {})
    make_run(tmp_path / "run", world)  # also after `prepare` resolved the step's scale
    require_same_inputs(run, learner)
    other = type(
        "Other",
        (TabularLearner,),
        {"identity": lambda self: {"policy": "another", "law": "tabular"}},
    )(world, learner.prompts)
    with pytest.raises(UserError, match="policy changed since `prepare`"):
        require_same_inputs(run, other)
    run.recipe_file.write_text(run.recipe_file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="was changed after init"):
        run.recipe()
    run.write_state(run.state() | {"version": 0})
    with pytest.raises(UserError, match="version 0, this program reads"):
        run.state()
    run.state_file.write_text("{")
    with pytest.raises(UserError, match=r"state\.json:1: not valid JSON"):
        run.state()
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(tmp_path).recipe()


def test_a_score_constant_on_the_reference_pool_is_refused(tmp_path):
    world = random_world(12)
    flat = type(world)(
        world.problem, world.ref_logp, world.reward, {"g0": np.zeros_like(world.reward)}
    )
    run, recipe, learner = make_run(tmp_path / "run", flat)
    with pytest.raises(UserError, match=r"scorer of g0: gives 0\.0 to all"):
        prepare(run, recipe, learner, {})
