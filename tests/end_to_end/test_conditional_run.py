"""A real conditional run on the embedded world: a family fitted in two stretches, its dual solved
by trials, every file of it, and real kills."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special

from constrained_dpo.estimates.slack import prompt_slack
from constrained_dpo.fit.family import read_family, write_member
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.family import multiplier_range
from constrained_dpo.run.record import RoundRecord, read_optimum, read_records, replay
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo, kill_when
from tests.helpers.launches import CDPO, TOLERANCE, ended, launch, new_run, weights_differ
from tests.helpers.paths import CONDITIONAL, QUICKSTART, SOLVED
from tests.helpers.wrecks import content, leftovers


@pytest.fixture(scope="module")
def run(conditional_run) -> RunDirectory:
    return conditional_run


def attempts(run: RunDirectory, number: int) -> int:
    """Fits of a round: one, and more where λ moved nothing yet."""
    return sum(run.family_folder(number, attempt).exists() for attempt in range(3))


def last_family(run: RunDirectory, number: int) -> Path:
    return run.family_folder(number, attempts(run, number) - 1)


def trial_files(run: RunDirectory, number: int, attempt: int = -1) -> list[Path]:
    attempt = attempts(run, number) - 1 if attempt < 0 else attempt
    return sorted(run.trials_folder(number, attempt).glob("*.parquet"))


def labels_of(run: RunDirectory, number: int) -> list[pd.DataFrame]:
    stretches = range(2 * attempts(run, number))
    return [read_parquet(run.labels_file(number, False, stretch)) for stretch in stretches]


def test_every_label_follows_from_its_own_multipliers_and_the_pool(run):
    """Margins and targets again, from the labels' λ and the pool's scores alone (invariant 3)."""
    for number, record in enumerate(read_records(run)):
        pool = run.pool(run.recipe(), number + 1).set_index("response_id")
        assert pool.index.is_unique
        family = read_family(run.family_folder(number))
        center = record.lambda_["harmless"]
        law = multiplier_range(run, run.recipe(), pd.Series(record.lambda_))
        assert family.low == dict(law.low) and family.high == dict(law.high)
        assert family.high["harmless"] == pytest.approx(3 * center)
        for stretch, labels in enumerate(labels_of(run, number)):
            lambda_, kappa = labels["lambda/harmless"], labels["kappa"]
            assert lambda_.between(family.low["harmless"], family.high["harmless"]).all()
            assert kappa.between(0.5, 1.5).all()
            assert lambda_.nunique() == kappa.nunique() == len(labels)
            chosen, rejected = (pool.loc[labels[c]] for c in ("chosen_id", "rejected_id"))
            score = lambda rows, lam=lambda_: (
                rows["helpful"].to_numpy() + lam.to_numpy() * rows["harmless"].to_numpy()
            )
            margin = score(chosen) - score(rejected)
            np.testing.assert_allclose(labels["margin"], margin, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(labels["target"], special.expit(margin), rtol=1e-9)
            assert labels.groupby("prompt_id").size().max() == 16  # half of pairs_per_prompt
            fresh = chosen["source"].eq(f"refresh:{number}.{stretch - 1}").any()
            assert fresh == (stretch % 2 == 1)  # a further fit begins on the same pool


def test_the_family_s_units_are_the_first_multipliers_and_it_goes_on_from_itself(run):
    first, second = (read_family(run.family_folder(number)) for number in (0, 1))
    assert first.units == second.units == run.state().lambda_[0]
    assert first.kappa == (0.5, 1.5) and first.rank == run.recipe().policy.lora.r
    logs = [
        json.loads((run.family_folder(number) / "training_log.json").read_text())
        for number in (0, 1)
    ]
    assert [log["anchor_error"] for log in logs] == [None, None]  # of a later stretch
    for log in logs:
        assert [row["step"] for row in log["log"] if "loss" in row] == list(range(1, 13))


def test_the_record_s_trials_follow_from_their_tables(run):
    reference = read_parquet(run.reference_file).query("split == 'dual'")
    problem = run.recipe().problem
    for number, record in enumerate(read_records(run)):
        files = trial_files(run, number)
        assert len(files) == len(record.trials) <= 3 and record.step == "solved"
        assert record.trials[0].lambda_ == record.lambda_
        family = read_family(last_family(run, number))
        for file, trial in zip(files, record.trials, strict=True):
            table = read_parquet(file)
            assert set(table["lambda/harmless"]) == {trial.lambda_["harmless"]}
            assert set(table["kappa"]) == {trial.kappa} == {1.0} and trial.shift == {"harmless": 0}
            u = prompt_slack(table, reference, problem).mean()["harmless"]
            assert trial.u["harmless"] == pytest.approx(u)
            assert len(table) == trial.num_samples == 4 * reference["prompt_id"].nunique()
            low, high = family.low["harmless"], family.high["harmless"]
            assert low <= trial.lambda_["harmless"] <= high
        assert low <= record.lambda_next["harmless"] <= high
        assert record.policy_lambda == record.lambda_next == run.state().lambda_[number + 1]
    assert replay(run) == run.state().lambda_


def test_the_adapter_is_the_member_and_what_sampled(run, tmp_path):
    """Invariant 11 in a run: made again from the family it is the same bytes, and the stored
    log-probabilities are its own."""
    learner = LoraLearner(run.recipe(), run.prompts())
    for number, record in enumerate(read_records(run)):
        at, output = pd.Series(record.lambda_next), tmp_path / str(number)
        write_member(last_family(run, number), at, record.kappa, output)
        for file in output.iterdir():
            assert file.read_bytes() == (run.adapter_folder(number) / file.name).read_bytes()
        samples = read_parquet(run.samples_file(number))
        logps = learner.log_probabilities(samples, run.adapter_folder(number))
        np.testing.assert_allclose(samples["policy_logp"], logps, atol=1e-3)
        # and a trial's are those of the member that it names
        table = read_parquet(trial_files(run, number)[-1])
        at = pd.Series({"harmless": table["lambda/harmless"].iloc[0]})
        write_member(last_family(run, number), at, 1.0, tmp_path / f"trial-{number}")
        logps = learner.log_probabilities(table, tmp_path / f"trial-{number}")
        np.testing.assert_allclose(table["policy_logp"], logps, atol=1e-3)


def test_the_pool_grew_by_all_that_was_sampled_on_dual_prompts(run):
    records = read_records(run)
    tried = [(r.round, attempt) for r in records for attempt in range(attempts(run, r.round))]
    trials = {f"trial:{t}.{a}.{k}" for t, a in tried for k in range(len(trial_files(run, t, a)))}
    rounds = {f"refresh:{t}.{2 * a}" for t, a in tried} | {f"round:{r.round}" for r in records}
    pool = run.pool(run.recipe(), 2)
    assert set(pool["source"]) == {"reference-pool"} | trials | rounds
    dual = set(run.prompts().query("split == 'dual'")["prompt_id"])
    assert set(pool.loc[pool["source"] != "reference-pool", "prompt_id"]) == dual
    assert pool[["helpful", "harmless", "ref_logp", "policy_logp"]].notna().all(axis=None)
    assert leftovers(run) == []


def test_records_and_exact_values(run):
    records, optimum = read_records(run), read_optimum(run)
    for record in records:
        assert record.seconds.keys() >= {"relabel", "fit", "refresh", "trials", "rescore"}
        assert all(value is not None for value in record.seconds.values())
        exact = record.exact_on("dual")
        assert exact.objective < optimum["dual"].objective and exact.lagrangian_gap > 0
        assert RoundRecord.from_json(record.to_json()) == record


def test_status_and_report_know_such_a_run(conditional_run, tmp_path):
    words = (conditional_run.path.parent / "stderr").read_text()
    run = RunDirectory(shutil.copytree(conditional_run.path, tmp_path / "run"))
    assert words.count("round 0: refresh ...") == attempts(run, 0) and "Traceback" not in words
    assert "round 1 done: harmless: λ" in words
    full = cdpo("status", run.path, "--full", check=0).stdout
    table = full.split("λ for the next round")[0]
    for record in read_records(run):  # the policy's own λ stands in its row
        assert f"harmless {record.lambda_next['harmless']:.4f}" in table
    state = json.loads(cdpo("status", run.path, "--json", check=0).stdout)
    assert len(state["rounds"]) == 2
    page = Path(cdpo("report", run.path, check=0).stdout.splitlines()[-1])
    assert page.name == "report.html" and "harmless" in page.read_text()


def killed_run(tmp_path, moment) -> RunDirectory:
    """The same run, killed by kill -9 of its group at a moment, then played to its end."""
    run = init_run(QUICKSTART, tmp_path / "run", list(CONDITIONAL))
    assert kill_when(["run", str(run.path)], lambda: moment(run)), "the run ended before"
    assert run.rounds_done() < 2
    cdpo("run", run.path, check=0)
    return run


MOMENTS = {
    "in the trials": lambda run: (run.trials_folder(0) / "00.parquet").exists(),
    "in the second round's trials": lambda run: (run.trials_folder(1) / "01.parquet").exists(),
    "in the refresh": lambda run: (run.refresh_folder(0, 0) / "checkpoint").exists(),
    "in the second stretch": lambda run: run.labels_file(1, False, 1).exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_a_run_killed_equals_one_never_killed(run, tmp_path, name):
    killed = killed_run(tmp_path, MOMENTS[name])
    ours, theirs = content(killed), content(run)
    assert [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)] == []
    assert leftovers(killed) == []


@pytest.mark.slow
def test_two_processes_play_a_conditional_round_as_one_with_twice_the_batch(tmp_path_factory):
    """Stretches, trials and the member; the trials are at the same λ."""
    one, two = (new_run(tmp_path_factory, size, *SOLVED) for size in (8, 4))
    launched = launch(*CDPO, "round", two.path, "--json")
    cdpo("round", one.path, check=0)
    out, err = ended(launched, 0)
    assert json.loads(out.splitlines()[-1])["processes"] == 2
    assert err.count("round 0: trials ...") == 1 and err.count("round 0: refresh ...") == 1
    for stretch in range(2):
        files = [run.labels_file(0, False, stretch) for run in (one, two)]
        assert read_parquet(files[0]).equals(read_parquet(files[1])), stretch
    difference, moved = weights_differ(one.adapter_folder(0), two.adapter_folder(0))
    assert difference < TOLERANCE * moved and moved > 1e-4
    records = [RoundRecord.read(run.round_file(0)) for run in (one, two)]
    assert len(records[0].trials) == len(records[1].trials)
    for first, second in zip(records[0].trials, records[1].trials, strict=True):
        assert second.lambda_["harmless"] == pytest.approx(first.lambda_["harmless"], rel=1e-6)
    assert two.state().lambda_[1] == pytest.approx(one.state().lambda_[1], rel=1e-6)
    assert replay(two) == two.state().lambda_ and leftovers(two) == []
