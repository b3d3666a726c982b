"""`Run`, and the names that the packages offer: what needs no model. Rounds are played from Python
by the test of docs/python-api.md."""

import subprocess
import sys

import pytest
import yaml

import constrained_dpo
import data_prep
from constrained_dpo import Recipe, RoundRecord, Run, RunStatus, UserError, load_recipe
from constrained_dpo.check.history import History
from constrained_dpo.run.record import read_records
from tests.helpers.paths import QUICKSTART
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

LIGHT = """
import sys
import constrained_dpo, data_prep

assert constrained_dpo.__all__ and data_prep.__all__
heavy = {"torch", "transformers", "pandas", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_packages_loads_no_library():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [constrained_dpo, data_prep], ids=lambda p: p.__name__)
def test_every_name_that_is_offered_is_there(package):
    assert list(package._PLACES) == package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        thing = getattr(package, name)
        assert thing.__name__ == name and thing.__module__ == package._PLACES[name]
    with pytest.raises(AttributeError, match="has no attribute 'Runs'"):
        _ = package.Runs


def test_dir_lists_the_names():
    assert dir(constrained_dpo) == sorted([*constrained_dpo.__all__, "__version__"])


@pytest.mark.parametrize("kind", ["path", "text", "dict", "recipe"])
def test_a_run_is_created_from_a_file_a_dict_or_a_recipe(tmp_path, kind):
    source = {
        "path": QUICKSTART,
        "text": str(QUICKSTART),
        "dict": yaml.safe_load(QUICKSTART.read_text()),
        "recipe": load_recipe(QUICKSTART),
    }[kind]
    run = Run.create(source, tmp_path / "run", overrides=["objective.beta=0.5"])
    assert isinstance(run.recipe, Recipe) and run.path == tmp_path / "run"
    assert run.recipe.hash() == load_recipe(QUICKSTART, ["objective.beta=0.5"]).hash()
    status = Run.open(str(run.path)).status()
    assert status.rounds == [] and status.lambda_ is None and status.next.startswith("prepare")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory") as error:
        Run.open(tmp_path)
    assert isinstance(error.value, ValueError)
    with pytest.raises(UserError, match="no round has been played yet"):
        Run.create(QUICKSTART, tmp_path / "run").record()


def test_a_played_run_is_read(small_run):
    run = Run.open(small_run.path)
    status, records = run.status(), [run.record(number) for number in (0, 1)]
    assert isinstance(status, RunStatus) and status.rounds == records
    assert all(isinstance(record, RoundRecord) for record in records)
    assert run.record() == run.record("last") == records[1]
    assert status.lambda_ == records[1].lambda_next and repr(run) == f"Run({str(run.path)!r})"
    with pytest.raises(UserError, match="--round 2: give a round from 0 to 1"):
        run.record(2)


def test_the_verdict_of_a_round_by_name_and_number(small_run):
    run = Run(small_run.path)
    first, last = read_records(small_run)
    assert run.verdict() == run.verdict("last") == last.test.verdicts["harmless"] != "satisfied"
    assert run.verdict(0) == first.verdict
    assert run.status().best_dual is None  # 8 responses carry no certificate
    with pytest.raises(UserError, match="--round best-dual: no round has a dual value"):
        run.verdict("best-dual")
    with pytest.raises(UserError, match="no round of 2 is satisfied on the dual prompts"):
        run.verdict("best")


def test_the_best_round_is_found_where_one_is_satisfied(tmp_path):
    directory, recipe, learner = make_run(tmp_path / "run", random_world(1, margin=-3.0))
    play(directory, recipe, learner, 1)
    run = Run(directory.path)
    assert run.verdict("best") == run.record("best").verdict == "satisfied"
    assert run.status().best == 0


def test_a_played_runs_history_is_recomputed(small_run):
    history = Run(small_run.path).check()
    assert isinstance(history, History) and history.lambda_ == small_run.state().lambda_


def test_a_played_run_is_reported(run):
    page = Run(run.path).report(0)
    assert page == run.path / "report" / "report.html" and "round 0" in page.read_text()
