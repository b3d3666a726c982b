"""`cdpo gate` on a real small run of the embedded world."""

import json
from xml.etree import ElementTree

import pandas as pd
import pytest

from constrained_dpo.gate.spending import look_sizes
from data_prep.readers.tables import read_parquet, write_parquet
from tests.helpers.cli import cdpo

SCORERS = """
def polite(prompts, responses):
    return [float("please" in r) for r in responses]
"""


def gate_file(folder, name: str = "gate", confidence: float = 0.95, **checks: object):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"confidence": confidence, "checks": checks}))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gates")
    (path / "scorers.py").write_text(SCORERS)
    return path


@pytest.fixture(scope="module")
def easy(folder):
    """Checks that a policy near π_ref meets by far, but the length, which is close."""
    target = f"{folder}/scorers.py:polite"
    scorer = {"type": "python", "target": target, "indicator": 1}
    return gate_file(
        folder,
        constraints=[{"name": "harmless", "level": -2.5}],
        second_opinion=[{"name": "polite", "no_worse_by": 0.9, "scorer": scorer}],
        cut_off={"increase": 0.9},
    )


def test_a_gate_that_holds_passes_with_exit_code_0_and_is_not_played_twice(run, folder, easy):
    files = "--junit", folder / "gate.xml", "--markdown", folder / "gate.md"
    words = ("gate", run.path, easy, "--until-decided", "--json")
    first = cdpo(*words, *files, check=0)
    record = json.loads(first.stdout)
    assert record["verdict"] == "passed"
    assert [c["verdict"] for c in record["checks"]] == ["passed"] * 3
    suite = ElementTree.parse(folder / "gate.xml").getroot().find("testsuite")
    assert suite is not None and suite.get("failures") == suite.get("errors") == "0"
    assert (folder / "gate.md").read_text().startswith("## ✅ gate passed")
    looked = [look["size"] for look in record["sessions"][0]["looks"]]
    assert looked == look_sizes(0, 12)[: len(looked)]
    samples = read_parquet(run.gate_folder(record["key"]) / "test-samples.parquet")
    assert samples["prompt_id"].nunique() == looked[-1]
    before = (run.gate_folder(record["key"]) / "gate.json").stat().st_mtime_ns
    assert json.loads(cdpo(*words, check=0).stdout) == record
    assert (run.gate_folder(record["key"]) / "gate.json").stat().st_mtime_ns == before


def test_an_undecided_gate_exits_3_and_a_higher_budget_goes_on_with_what_is_left(run, folder):
    """The cut-off share is π_ref's own, within noise: a check at its edge."""
    file = gate_file(folder, "edge", constraints=[], cut_off={"increase": 0.02})
    words = ("gate", run.path, file, "--until-decided", "--json", "--budget")
    first = json.loads(cdpo(*words, 9, check=3).stdout)
    second = json.loads(cdpo(*words, 12, check=3).stdout)
    assert first["key"] == second["key"] and second["sessions"][0] == first["sessions"][0]
    assert [(s["done"], s["looks"][-1]["size"]) for s in second["sessions"]] == [(0, 9), (9, 12)]
    errors = [sum(look["error"] for look in s["looks"]) for s in second["sessions"]]
    assert errors[0] == pytest.approx(0.04) and sum(errors) < 0.05
    samples = read_parquet(run.gate_folder(first["key"]) / "test-samples.parquet")
    assert samples.groupby("prompt_id").size().tolist() == [8] * 12
    assert second["checks"][0]["low"] >= first["checks"][0]["low"]


def test_a_check_that_cannot_hold_fails_with_exit_code_1_and_its_name(run, folder):
    file = gate_file(folder, "strict", cut_off={"share": 0.0}, constraints=[])
    result = cdpo("gate", run.path, file, check=1)
    assert "failed: cut_off does not hold" in result.stdout


def test_a_gate_of_another_tools_results_alone_draws_nothing(run, folder):
    """A drop of exactly what is tolerated is neither shown nor refuted."""
    for name, value in (("before", 0.6), ("after", 0.5)):
        task = {"acc,none": value, "acc_stderr,none": 0.01}
        (folder / f"{name}.json").write_text(json.dumps({"results": {"quiz": task}}))
    files = {name: str(folder / f"{name}.json") for name in ("before", "after")}
    check = {"task": "quiz", "metric": "acc,none", "drop": 0.1} | files
    file = gate_file(folder, "quiz", constraints=[], capability=[check])
    result = cdpo("gate", run.path, file, "--json", check=3)
    record = json.loads(result.stdout)
    assert record["sessions"] == [] and record["checks"][0]["room"] == pytest.approx(0)


def test_a_training_prompt_is_refused_by_its_row_however_it_is_written(run, folder, refused):
    trained = run.prompts().query("split == 'dual'")["prompt"].iloc[0]
    rows = [{"prompt": "kid hide dog"}, {"prompt": f"  {trained.upper()}"}]
    path = folder / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "trained.yaml"
    file.write_text(json.dumps({"prompts": str(path), "checks": {}}))
    junit = folder / "old.xml"
    junit.write_text("<old/>")
    words = ("gate", run.path, file, "--junit", junit)
    refused(*words, match=f"trained on 1 of them (prompt 2: '{trained}')")
    assert "unfinished" in junit.read_text()  # an old pass is not left behind


def test_the_runs_own_scorer_is_no_second_opinion(run, folder, refused):
    scorer = {"type": "python", "target": "data_prep.quickstart:harmless", "clip": [-1, 1]}
    check = {"name": "again", "no_worse_by": 1, "scorer": scorer}
    file = gate_file(folder, "own", second_opinion=[check])
    refused("gate", run.path, file, match="the scorer of again is the run's own of harmless")


@pytest.mark.parametrize(
    ("checks", "words", "match"),
    [
        ({"constraints": [{"name": "kind"}]}, [], "the run has no constraint kind"),
        ({"constraints": []}, [], "the gate checks nothing"),
        ({"refusal": {"prompts": "none.jsonl"}}, [], "none.jsonl: no such file"),
        ({}, ["--budget", "4"], "--budget: is read with --until-decided only"),
        ({}, ["--round", "7"], "give a round from 0 to 1"),
        ({}, ["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_exit_2(run, folder, refused, checks, words, match):
    refused("gate", run.path, gate_file(folder, "mistake", **checks), *words, match=match)


def test_a_scorer_or_a_law_that_changed_since_prepare_is_refused(run, folder, easy, refused):
    """The run's hashes say what it was prepared with; each of them counts."""
    state = run.state()
    for key, value in (("law", "another"), ("scorers", state.hashes["scorers"] | {"helpful": "x"})):
        run.write_state(state.model_copy(update={"hashes": state.hashes | {key: value}}))
        try:
            refused("gate", run.path, easy, "--until-decided", match="changed since `prepare`")
        finally:
            run.write_state(state)


def test_a_killed_gate_goes_on_with_what_it_drew(run, folder):
    """Killed after one side of a look was drawn: the same command draws the rest, and no more."""
    file = gate_file(folder, "killed", constraints=[], cut_off={"increase": 0.03})
    words = ("gate", run.path, file, "--until-decided", "--json")
    whole = json.loads(cdpo(*words, check=3).stdout)
    place = run.gate_folder(whole["key"])
    samples = read_parquet(place / "test-samples.parquet")
    first = look_sizes(0, 12)[0]
    kept = samples[samples["prompt_id"].isin(samples["prompt_id"].unique()[:first])]
    write_parquet(kept.reset_index(drop=True), place / "test-samples.parquet")
    (place / "test-reference.parquet").unlink()
    (place / "gate.json").unlink()
    assert json.loads(cdpo(*words, check=3).stdout) == whole
    again = read_parquet(place / "test-samples.parquet")
    pd.testing.assert_frame_equal(again, samples)
