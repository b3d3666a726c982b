"""`cdpo init --from`: another problem on a prepared run's samples and scores."""

import json
import sqlite3
from contextlib import closing

import pandas as pd
import pytest

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.quickstart import build_policy
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, SMALL


def cached_scores(run: RunDirectory) -> int:
    with closing(sqlite3.connect(run.score_cache)) as database:
        return database.execute("SELECT count(*) FROM scores").fetchone()[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> RunDirectory:
    """A prepared run. The model is named by its folder, so that nothing is enumerated."""
    run = init_run(QUICKSTART, tmp_path_factory.mktemp("source") / "run", settings())
    cdpo("prepare", run.path, check=0)
    return run


def settings(*overrides: str) -> list[str]:
    return [*SMALL, f"policy.model={build_policy()}", *overrides]


def test_numbers_that_a_recipe_leaves_open_are_no_difference(source, tmp_path):
    """The level's samples are the source's, though a solved run would draw twice as many."""
    solved = settings("dual.method=solve", "fit.conditional={}", "fit.refresh=1")
    run = init_run(QUICKSTART, tmp_path / "solved", solved, source)
    assert run.state().inherited["from"] == str(source.path.resolve())
    fixed = settings("dual.reference_responses=9")
    with pytest.raises(UserError, match=r"dual\.reference_responses differs"):
        init_run(QUICKSTART, tmp_path / "fixed", fixed, source)


def test_init_from_samples_and_scores_nothing_twice(source, tmp_path):
    """Another margin and β and one more constraint on a prepared run: the same responses, and only
    the new utility is scored."""
    constraints = [
        {
            "name": name,
            "margin": margin,
            "scorer": {"type": "python", "target": f"data_prep.quickstart:{name}"},
        }
        for name, margin in (("harmless", 0.3), ("humor", 0.1))
    ]
    overrides = settings("objective.beta=0.5", f"objective.constraints={json.dumps(constraints)}")
    options = [word for override in overrides for word in ("-s", override)]
    other = RunDirectory(tmp_path / "other")
    cdpo("init", QUICKSTART, other.path, *options, "--from", source.path, check=0)
    cdpo("prepare", other.path, check=0)
    tables = []
    for file in (lambda run: run.pool_file(None), lambda run: run.reference_file):
        tables.append(read_parquet(file(other)))
        before = read_parquet(file(source))
        pd.testing.assert_frame_equal(tables[-1].drop(columns="humor"), before)
    both, prompt = pd.concat(tables), source.prompts().set_index("prompt_id")["prompt"]
    texts = set(zip(both["prompt_id"].map(prompt), both["response"], strict=True))
    # The new utility once per distinct text, nothing of the others.
    assert cached_scores(other) == cached_scores(source) + len(texts)
    assert set(other.state().lambda_[0]) == {"harmless", "humor"}


def test_init_from_refuses_what_was_sampled_otherwise(source, tmp_path):
    differs = r"sampling\.temperature differs \(1\.0 there, 0\.9 here\)"
    with pytest.raises(UserError, match=differs):
        init_run(QUICKSTART, tmp_path / "a", settings("sampling.temperature=0.9"), source)
    unprepared = init_run(QUICKSTART, tmp_path / "b", settings())
    with pytest.raises(UserError, match="is not prepared yet"):
        init_run(QUICKSTART, tmp_path / "c", settings(), unprepared)
