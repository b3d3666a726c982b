"""A real run on the embedded world, killed by kill -9 of its process group in three phases,
resumed, equal to one never killed."""

import json

import pandas as pd

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from tests.helpers.cli import cdpo, kill_when
from tests.helpers.paths import QUICKSTART, SMALL


def content(run: RunDirectory) -> dict:
    """λ history, tables and adapters to the last bit."""
    files = [
        f for ending in ("parquet", "safetensors") for f in sorted(run.path.rglob(f"*.{ending}"))
    ]
    return {str(f.relative_to(run.path)): f.read_bytes() for f in files} | {
        "lambda": run.state()["lambda"]
    }


def test_a_run_killed_three_times_equals_one_never_killed(small_run, tmp_path):
    run = init_run(QUICKSTART, tmp_path / "run", list(SMALL))
    moments = {
        "sampling the reference": lambda: (
            any(run.shard_folder("pool").glob("*.parquet")) and not run.pool_file(None).exists()
        ),
        "inside the fit": lambda: (
            run.pairs_file(0).exists() and (run.round_folder(0) / ".adapter.tmp").exists()
        ),
        "re-scoring round 1": lambda: any(run.shard_folder("round-001").glob("*.parquet")),
    }
    for name, moment in moments.items():
        assert kill_when(["run", str(run.path)], moment), f"the run ended before it was {name}"
        for file in run.path.rglob("*.parquet"):
            if not file.name.startswith("."):
                pd.read_parquet(file)  # nothing half-written is in view
        json.loads(run.state_file.read_text())
    cdpo("run", run.path, check=0)
    found, expected = content(run), content(small_run)
    assert [
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    ] == []
    assert not list(run.path.rglob(".*.tmp")) and not list(run.path.rglob("shards/*/*"))


def test_check_replays_the_history_and_status_says_what_is_next(small_run):
    assert "equal to state.json" in cdpo("check", small_run.path, check=0).stdout
    status = json.loads(cdpo("status", small_run.path, "--json", check=0).stdout)
    assert len(status["rounds"]) == 2 and "all 2 rounds of the recipe are done" in status["next"]
    record = small_run.round_record(1)
    for key in (
        "round",
        "lambda",
        "lambda_next",
        "u",
        "u_se",
        "u_ci_low",
        "u_ci_high",
        "reward",
        "kl",
        "objective",
        "test",
        "verdict",
        "num_prompts",
        "num_samples",
        "cut_off_fraction",
        "mean_length",
        "seconds",
        "sampling_law",
        "hashes",
        "exact",
    ):
        assert record[key] is not None, key
    table = cdpo("status", small_run.path, check=0).stdout
    assert "E[helpful] − 0.25·KL" in table and f"{record['lambda']['harmless']:.4f}" in table


def test_a_fresh_process_finds_the_run_done(small_run):
    assert "all 2 rounds are done" in cdpo("run", small_run.path, check=0).stdout


def test_estimates_agree_with_the_exact_values(small_run):
    """Monte-Carlo u, E[r] and KL of a real LoRA policy against full enumeration through the same
    forward."""
    record, optimum = small_run.round_record(1), json.loads(small_run.exact_file.read_text())
    for split, part in (("dual", record), ("test", record["test"])):
        exact = record["exact"][split]
        assert abs(part["u"]["harmless"] - exact["u"]["harmless"]) < 5 * part["u_se"]["harmless"]
        assert abs(part["reward"] - exact["reward"]) < 5 * part["reward_se"]
        assert abs(part["kl"] - exact["kl"]) < 0.5
        assert (
            exact["objective"]
            <= optimum[split]["objective"]
            + optimum[split]["lambda"]["harmless"] * max(-exact["u"]["harmless"], 0)
            + 1e-6
        )


def test_sampling_off_the_policy_nulls_what_it_does_not_support(tmp_path):
    """Invariant 8: at temperature ≠ 1, KL and objective are null with the reason; u stays, under
    the same law on both sides."""
    run = tmp_path / "run"
    overrides = [
        part for s in (*SMALL, "dual.rounds=1", "sampling.temperature=0.8") for part in ("-s", s)
    ]
    cdpo("init", QUICKSTART, run, *overrides, check=0)
    record = json.loads(cdpo("round", run, "--json", check=0).stdout)
    assert (
        record["kl"] is None
        and record["objective"] is None
        and "temperature" in record["kl_reason"]
    )
    assert record["u"]["harmless"] is not None and record["sampling_law"]["temperature"] == 0.8
