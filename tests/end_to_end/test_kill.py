"""Real runs on the embedded world, killed by kill -9 of their process group and resumed, equal to
one never killed. `kill_many.py` does it at scale."""

import json

import pandas as pd
import pytest

from constrained_dpo.fit.checkpoints import SEAL
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from data_prep.quickstart import build_policy
from tests.helpers.cli import cdpo, kill_when
from tests.helpers.paths import QUICKSTART, SMALL


def content(run: RunDirectory) -> dict:
    """λ history, tables and adapters to the last bit."""
    files = [file for end in ("parquet", "safetensors") for file in run.path.rglob(f"*.{end}")]
    results = {str(file.relative_to(run.path)): file.read_bytes() for file in files}
    return results | {"lambda": run.state().lambda_}


def assert_nothing_half_written(run: RunDirectory) -> None:
    for file in run.path.rglob("*.parquet"):
        if not file.name.startswith("."):
            pd.read_parquet(file)
    json.loads(run.state_file.read_text())


def assert_equal(run: RunDirectory, expected: RunDirectory, rounds: int) -> None:
    """The first rounds of another run are all there is."""
    ours, theirs = content(run), content(expected)
    later = [f"{number:03d}" for number in range(rounds, expected.rounds_done())]
    theirs = {k: v for k, v in theirs.items() if not any(number in k for number in later)}
    theirs["lambda"] = theirs["lambda"][: rounds + 1]
    names = ours.keys() | theirs.keys()
    assert [name for name in names if ours.get(name) != theirs.get(name)] == []
    assert not list(run.path.rglob(".*.tmp")) and not list(run.path.rglob("shards/*/*"))


@pytest.mark.slow
def test_a_run_killed_inside_a_fit_goes_on_from_its_checkpoint_to_the_same_results(
    small_run, tmp_path
):
    """Those of a run without checkpoints, with the world enumerated."""
    overrides = [*SMALL, "fit.save_steps=8", f"policy.model={build_policy()}"]
    run = init_run(QUICKSTART, tmp_path / "run", overrides)
    seals = lambda: any(run.checkpoints_folder(0).glob(f"checkpoint-*/{SEAL}"))
    assert kill_when(["round", str(run.path)], seals), "the run ended before its fit was killed"
    assert not run.adapter_folder(0).exists()
    assert_nothing_half_written(run)
    assert "fit: goes on from checkpoint-" in cdpo("round", run.path, check=0).stderr
    assert_equal(run, small_run, rounds=1)


@pytest.mark.slow
def test_a_run_killed_in_three_phases_equals_one_never_killed(small_run, tmp_path):
    run = init_run(QUICKSTART, tmp_path / "run", list(SMALL))
    adapter = run.round_folder(0) / ".adapter.tmp"
    shards = lambda phase: any(run.shard_folder(phase).glob("*.parquet"))
    moments = {
        "sampling the reference": lambda: shards("pool") and not run.pool_file(None).exists(),
        "inside the fit": lambda: run.pairs_file(0).exists() and adapter.exists(),
        "re-scoring round 1": lambda: shards("round-001"),
    }
    for name, moment in moments.items():
        assert kill_when(["run", str(run.path)], moment), f"the run ended before it was {name}"
        assert_nothing_half_written(run)
    cdpo("run", run.path, check=0)
    assert_equal(run, small_run, rounds=2)
