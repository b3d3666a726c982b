"""A run's folder: its lock, what a kill leaves in it, and what is refused because it changed."""

import multiprocessing

import numpy as np
import pytest

from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare, require_same_inputs
from data_prep.errors import UserError
from tests.helpers.rounds import make_run
from tests.helpers.tables import random_world


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


def test_the_same_recipe_again_is_no_error_and_another_one_is_refused(tmp_path):
    world = random_world(10)
    run, recipe, learner = make_run(tmp_path / "run", world)
    make_run(tmp_path / "run", world)
    with pytest.raises(UserError, match="run of another recipe"):
        make_run(tmp_path / "run", world, ["seed=5"])
    prepare(run, recipe, learner, {})
    make_run(tmp_path / "run", world)  # also after `prepare` resolved the step's scale
    require_same_inputs(run, learner)

    class Other(TabularLearner):
        def identity(self):
            return {"policy": "another", "law": "tabular"}

    with pytest.raises(UserError, match="policy changed since `prepare`"):
        require_same_inputs(run, Other(world, learner.prompts))


def test_edited_recipes_other_versions_and_damaged_states_are_refused(tmp_path):
    run, _, _ = make_run(tmp_path / "run", random_world(10))
    run.recipe_file.write_text(run.recipe_file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="was changed after init"):
        run.recipe()
    run.write_state(run.state().model_copy(update={"version": 0}))
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
