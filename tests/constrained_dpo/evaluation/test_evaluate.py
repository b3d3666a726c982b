"""`cdpo evaluate` on a real small run of the embedded world."""

import json
import shutil

import numpy as np
import pytest

from constrained_dpo.estimates.intervals import spent_confidence
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo

POLITE = 'polite={type: python, target: "SCORERS:polite"}'


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorers") / "scorers.py"
    path.write_text(
        "def polite(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
    )
    return POLITE.replace("SCORERS", str(path))


@pytest.fixture(scope="module")
def evaluated(run, scorers) -> dict:
    """The last round's policy on the test prompts, with an extra score."""
    return json.loads(cdpo("evaluate", run.path, "--scorer", scorers, "--json", check=0).stdout)


def tables(run, record: dict):
    folder = run.evaluation_folder(record["key"])
    return (read_parquet(folder / f"{name}.parquet") for name in ("samples", "reference"))


def test_evaluate_draws_fresh_samples_on_the_test_prompts(run, evaluated):
    samples, _ = tables(run, evaluated)
    stored = read_parquet(run.samples_file(1)).query("split == 'test'")
    assert set(samples["prompt_id"]) == set(stored["prompt_id"])
    assert evaluated["num_samples"] == len(samples)
    assert samples["response"].tolist() != stored["response"].tolist()


def test_the_reference_responses_are_the_stored_ones(run, evaluated):
    _, reference = tables(run, evaluated)
    assert set(reference["response_id"]) <= set(read_parquet(run.reference_file)["response_id"])


def test_an_extra_score_is_reported_before_and_after(run, evaluated):
    words = lambda table: table["response"].str.split().str.len().groupby(table["prompt_id"]).mean()
    after, before = map(words, tables(run, evaluated))
    assert evaluated["change"]["polite"]["difference"] == pytest.approx((after - before).mean())


def test_slack_is_the_change_less_the_margin_and_the_rounds_within_error(run, evaluated):
    u, change = evaluated["u"]["harmless"], evaluated["change"]["harmless"]["difference"]
    assert u == pytest.approx(change - run.recipe().problem.bounds["harmless"])
    test = RoundRecord.read(run.round_file(1)).test
    error = np.hypot(evaluated["u_se"]["harmless"], test.u_se["harmless"])
    assert abs(u - test.u["harmless"]) < 5 * error


def test_the_same_arguments_give_the_stored_result(run, scorers, evaluated):
    words = ("evaluate", run.path, "--scorer", scorers)
    assert json.loads(cdpo(*words, "--json", check=0).stdout) == evaluated
    assert "verdict" in cdpo(*words, check=0).stdout


def test_more_samples_join_an_earlier_evaluation_as_one_more_look(run, tmp_path):
    copied = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    words = ("evaluate", copied.path, "--responses", 4, "--json")
    first = json.loads(cdpo(*words, check=0).stdout)
    before = read_parquet(copied.evaluation_folder(first["key"]) / "samples.parquet")
    second = json.loads(cdpo(*words, "--more", check=0).stdout)
    after = read_parquet(copied.evaluation_folder(second["key"]) / "samples.parquet")
    assert second["key"] == first["key"] and (first["looks"], second["looks"]) == (1, 2)
    assert second["num_samples"] == len(after) == 2 * first["num_samples"]
    assert after["response_id"].is_unique
    assert set(before["response_id"]) < set(after["response_id"])
    added = after[~after["response_id"].isin(before["response_id"])]
    assert added["response"].tolist() != before["response"].tolist()
    confidence = copied.recipe().dual.confidence
    looks = [spent_confidence(confidence, look) for look in (1, 2)]
    assert [first["verdict_confidence"], second["verdict_confidence"]] == looks
    assert json.loads(cdpo(*words, check=0).stdout) == second


def test_more_of_nothing_is_refused(run, refused):
    words = ("evaluate", run.path, "--responses", 3, "--more")
    refused(*words, match="--more: there is no such evaluation yet")


@pytest.fixture(scope="module")
def elsewhere(run, tmp_path_factory):
    """Words that evaluate round 0 on three prompts of another file."""
    file = tmp_path_factory.mktemp("prompts") / "other.jsonl"
    prompts = [{"prompt": f"kid hide {thing}"} for thing in ("safe", "dog", "door")]
    file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    words = ["--round", "0", "--prompts", file, "--responses", 4, "--json"]
    return ["evaluate", run.path, *words]


def test_evaluate_on_another_prompt_file_and_with_other_options_is_another_record(
    run, scorers, elsewhere
):
    """An extra scorer's options are part of the question, though not of its fingerprint."""
    options = [(), ("--scorer", scorers), ("--scorer", scorers.replace("}", ", indicator: 2}"))]
    records = [json.loads(cdpo(*elsewhere, *more, check=0).stdout) for more in options]
    assert len({record["key"] for record in records}) == 3
    assert (records[0]["num_prompts"], records[0]["num_samples"]) == (3, 12)
    assert "other" in records[0]["key"]
    samples, reference = tables(run, records[2])
    assert samples["polite"].tolist() == [float(len(r.split()) >= 2) for r in samples["response"]]
    assert len(reference) == 12 and reference["source"].str.contains("reference").all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--round", "7"], "give a round from 0 to 1, or best, best-dual, last"),
        (["--prompts", "none.jsonl"], "no such file"),
        (["--scorer", "harmless={type: python, target: 'a.py:b'}"], "already used column name"),
        (["--scorer", "x={type: pyton}"], "--scorer x"),
    ],
)
def test_mistakes(run, refused, arguments, match):
    refused("evaluate", run.path, *arguments, match=match)
