"""What a run's page begins with: which figure, whose answers, and the means."""

import json
from dataclasses import replace

import pytest

from constrained_dpo.evaluation.front import play_front, settings_of
from constrained_dpo.evaluation.front_source import FrontOptions
from constrained_dpo.report.contents import Contents, read_contents, signed
from constrained_dpo.report.picture import DrawnPicture
from constrained_dpo.report.run_figures import pictures
from constrained_dpo.report.run_lead import LEAD_ANSWERS, averages, lead_figure
from constrained_dpo.report.run_samples import sample_cards
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.rounds import play_round
from data_prep.files import write_json
from data_prep.readers.tables import read_parquet
from tests.helpers.rounds import make_run
from tests.helpers.tables import random_world

SETTINGS = ("dual.method=solve", "fit.conditional={}", "dual.rounds=2", "dual.trials=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A round of a family with two constraints, and a front of one point."""
    world = random_world(3, 2, prompts=24, responses=30)
    settings = [*SETTINGS, "dual.init={g0: 0.8, g1: 0.8}", "dual.responses_per_prompt=8"]
    run, recipe, learner = make_run(tmp_path_factory.mktemp("lead") / "run", world, settings)
    recipe = prepare(run, recipe, learner, {})
    play_round(run, recipe, learner)
    points = settings_of(run, recipe, lambdas={"g1": 0.5})
    play_front(run, recipe, learner, points, FrontOptions())
    return run


def lead_stem(contents: Contents) -> str:
    return lead_figure(contents, [DrawnPicture(p, {}) for p in pictures(contents)]).picture.stem


@pytest.mark.parametrize(
    ("verdicts", "decides"),
    [
        (("satisfied", "violated"), "2-g1"),
        (("undecided", "satisfied"), "1-g0"),
        (("undecided", "violated"), "2-g1"),
        (("satisfied", "satisfied"), "1-g0"),
    ],
)
def test_the_constraint_that_decides_the_verdict_leads(run, verdicts, decides):
    contents = read_contents(run)
    judged = dict(zip(("g0", "g1"), verdicts, strict=True))
    test = contents.record.test.model_copy(update={"verdicts": judged})
    record = contents.record.model_copy(update={"test": test})
    assert lead_stem(replace(contents, records=[record])) == f"front-{decides}"


def test_a_front_of_another_rounds_family_does_not_lead(run):
    front = read_contents(run).front
    assert front is not None and front.round == 0
    try:
        write_json(run.front_file, front.model_copy(update={"round": 1}).to_json())
        assert read_contents(run).front is None
        assert lead_stem(read_contents(run)).startswith("path-")
    finally:
        write_json(run.front_file, front.to_json())


def test_the_answers_and_means_are_those_of_the_tables(run):
    contents = read_contents(run)
    prompts = run.prompts()
    test = prompts.loc[prompts["split"] == "test", "prompt_id"]
    lead = sample_cards(contents)[:LEAD_ANSWERS]
    assert [(card["id"], card["draw"]) for card in lead] == [(pid, 0) for pid in test[:3]]
    table = read_parquet(run.reference_file)
    means = table[table["split"] == "test"].groupby("prompt_id")[["r", "g0", "g1"]].mean().mean()
    record = json.loads(run.round_file(0).read_text())["test"]
    after = {"r": record["reward"]} | record["utilities"]
    expected = [(n, signed(means[n], 2), signed(after[n], 2)) for n in ("r", "g0", "g1")]
    assert averages(contents)[:-1] == expected
    assert averages(contents)[-1][0] == "tokens"
