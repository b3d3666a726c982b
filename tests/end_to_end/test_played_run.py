"""What the commands say of a run that is played: its history, where it stands, and its estimates
beside the exact values."""

import json

import numpy as np
import pytest

from constrained_dpo.run.create import init_run
from constrained_dpo.run.record import RoundRecord, read_optimum, read_records
from data_prep.quickstart import build_policy
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, SMALL


def told(*words) -> dict:
    """What a command says in JSON."""
    return json.loads(cdpo(*words, "--json", check=0).stdout)


@pytest.fixture(scope="module")
def status(small_run) -> dict:
    return told("status", small_run.path)


def test_check_replays_the_history(small_run):
    assert "equal to state.json" in cdpo("check", small_run.path, check=0).stdout
    checked = told("check", small_run.path)
    assert checked["recomputed"] == 3
    assert checked["lambda"] == json.loads(small_run.state_file.read_text())["lambda"]


def test_every_field_of_a_round_is_filled(small_run):
    raw = json.loads(small_run.round_file(1).read_text())
    fields = {"round", "lambda", "lambda_next", "u", "u_se", "u_ci_low", "u_ci_high", "reward"}
    fields |= {"kl", "objective", "test", "verdict", "num_prompts", "num_samples", "mean_length"}
    fields |= {"cut_off_fraction", "seconds", "sampling_law", "hashes", "exact"}
    fields |= {"residual", "ess", "step"}
    assert {name for name in fields if raw[name] is None} == set()
    assert "lagrangian_gap" in raw  # null where the samples are too few to weigh


def test_status_says_what_is_next_and_shows_the_rounds(small_run, status):
    records = read_records(small_run)
    assert status["rounds"] == [record.to_json() for record in records]
    assert "all 2 rounds of the recipe are done" in status["next"]
    assert status["rounds_left"] == 0 and status["seconds_left"] == 0
    assert status["seconds_per_round"] > 0
    text = cdpo("status", small_run.path, check=0).stdout
    assert "E[helpful] − 0.25·KL" in text and "certificate (dual prompts): " in text
    assert f"{records[1].lambda_['harmless']:.4f}" in text
    assert records[1].test.verdicts["harmless"] in ("satisfied", "violated", "undecided")


def test_status_holds_the_certificate_in_json_too(status):
    assert status["certificate"].startswith("certificate (dual prompts): ")


def test_rounds_are_chosen_by_name(run, status):
    assert [r["dual_value"] for r in status["rounds"]] == [None, None]  # too few responses
    assert status["best_dual"] is None
    assert "--round best-dual: none qualifies" in cdpo("status", run.path, check=0).stdout
    report = cdpo("report", run.path, "--round", "best-dual", check=2)
    assert "--round best-dual: no round has a dual value" in report.stderr
    satisfied = status["best"] is not None
    report = cdpo("report", run.path, "--round", "best", check=0 if satisfied else 2)
    assert satisfied or "no round of 2 is satisfied on the dual prompts at 95 %" in report.stderr


def test_a_run_that_is_done_says_so(small_run):
    assert "all 2 rounds are done" in cdpo("run", small_run.path, check=0).stdout
    for more in ((), ("--until-converged",)):
        answer = told("run", small_run.path, *more)
        assert answer["round"] == 1 and answer["stopped"] is None


def test_a_prepared_run_says_how_it_was_prepared(run):
    assert told("prepare", run.path)["prompts"] == {"dual": 24, "test": 12}


@pytest.mark.parametrize("split", ["dual", "test"])
def test_estimates_agree_with_the_exact_values(small_run, split):
    """Monte-Carlo u, E[r] and KL of a real LoRA policy against full enumeration through the same
    forward."""
    record = RoundRecord.read(small_run.round_file(1))
    optimum, exact = read_optimum(small_run)[split], record.exact[split]
    measured = record if split == "dual" else record.test
    slack = measured.u["harmless"] - exact.u["harmless"]
    assert abs(slack) < 5 * measured.u_se["harmless"]
    assert abs(measured.reward - exact.reward) < 5 * measured.reward_se
    assert abs(measured.kl - exact.kl) < 0.5
    missing = np.maximum(-exact.u["harmless"], 0.0)
    best = optimum.optimal.objective + optimum.lambda_["harmless"] * missing
    assert exact.objective <= best + 1e-6


def test_sampling_off_the_policy_nulls_what_it_does_not_support(tmp_path):
    """Invariant 8: at temperature ≠ 1, KL and objective are null with the reason; u stays, under
    the same law on both sides."""
    overrides = ["prompts.max_fit=8", "prompts.max_test=4", "fit.steps=2", "fit.warmup_steps=0"]
    overrides += ["sampling.temperature=0.8", f"policy.model={build_policy()}"]
    run = init_run(QUICKSTART, tmp_path / "run", [*SMALL, *overrides])
    record = told("round", run.path)
    assert record["kl"] is None and record["objective"] is None
    assert "temperature" in record["kl_reason"]
    assert record["u"]["harmless"] is not None and record["sampling_law"]["temperature"] == 0.8


@pytest.mark.slow
def test_a_tempered_policy_has_all_numbers_and_they_are_the_exact_ones(tmp_path):
    """At policy.temperature 0.7 nothing is null for the law's sake; u, E[r] and KL agree with the
    enumeration of softmax(logits/0.7), the certificate's interval holds the exact gap, and what is
    exported says where to serve it."""
    overrides = ["policy.temperature=0.7", "fit.learning_rate=5e-3"]
    run = init_run(QUICKSTART, tmp_path / "run", [*SMALL, *overrides])
    told("run", run.path)
    assert told("check", run.path)["recomputed"] == 3
    record = RoundRecord.read(run.round_file(1))
    assert record.kl_reason is None and record.sampling_law.temperature == 1.0
    exact = record.exact["dual"]
    assert exact.kl > 0.05
    assert abs(record.kl - exact.kl) < 5 * record.kl_se
    assert abs(record.reward - exact.reward) < 5 * record.reward_se
    assert abs(record.u["harmless"] - exact.u["harmless"]) < 5 * record.u_se["harmless"]
    assert record.lagrangian_gap_low < exact.lagrangian_gap
    assert record.lagrangian_gap_high is None or exact.lagrangian_gap < record.lagrangian_gap_high
    cdpo("export", run.path, tmp_path / "out", check=0)
    assert "at temperature 0.7" in (tmp_path / "out" / "README.md").read_text()
    law = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert law["temperature"] == 0.7 and law["do_sample"] is True
