"""`margin: 0.5std`: what a recipe takes, what `prepare` freezes, that λ is recomputed from the
frozen recipe, what is printed."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import replay
from data_prep.errors import UserError
from data_prep.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, SMALL
from tests.helpers.rounds import make_run, play, tables_of
from tests.helpers.tables import random_world

IN_STD = "objective.constraints.harmless.margin=0.5std"


@pytest.mark.parametrize(("text", "level"), [("0.5std", 0.5), ("-1 std", -1.0), ("1e-1std", 0.1)])
def test_a_margin_in_std_is_no_number_until_its_unit_is_known(text, level):
    recipe = load_recipe(QUICKSTART, [f"objective.constraints.harmless.margin={text}"])
    problem = recipe.problem
    assert problem.unresolved == {"harmless": level} and problem.relative["harmless"]
    with pytest.raises(ValueError, match="harmless is in std still"):
        _ = problem.bounds
    assert problem.resolved({"harmless": 3.0}).bounds["harmless"] == pytest.approx(3 * level)
    frozen = recipe.with_reference_stds({"harmless": 3.0})
    assert (
        frozen.problem.bounds["harmless"] == pytest.approx(3 * level)
        and frozen.hash() == recipe.hash()
    )
    assert recipe.hash() != load_recipe(QUICKSTART).hash()


@pytest.mark.parametrize(
    "value", ["std", "0.5sd", "nanstd", "half", "true", ".inf", "[1]", "{a: 1}"]
)
def test_other_texts_are_refused_in_one_line(value):
    with pytest.raises(
        UserError,
        match=r"constraints\.0\.margin: it is .*; write a finite number, or .* such as 0\.5std",
    ) as error:
        load_recipe(QUICKSTART, [f"objective.constraints.harmless.margin={value}"])
    assert len(str(error.value).splitlines()) == 1


def test_threshold_and_margin_in_std_are_too_much():
    with pytest.raises(UserError, match="harmless: give exactly one of margin"):
        load_recipe(QUICKSTART, [IN_STD, "objective.constraints.harmless.threshold=1"])
    with pytest.raises(UserError, match="give a finite number"):
        Constraint("g", margin_in_std=np.inf)
    problem = ConstrainedProblem(
        "r", 1.0, (Constraint("a", threshold=1.0), Constraint("b", margin_in_std=2.0))
    )
    assert problem.resolved({"b": 0.5}).bounds.to_dict() == {"a": 1.0, "b": 1.0}


def test_prepare_freezes_the_unit_and_lambda_is_recomputed_from_it(tmp_path):
    """g0's margin in std, g1's as a number; the std is that of π_ref's scores on the dual prompts
    in reference.parquet."""
    world = random_world(5, 2, prompts=20)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["objective.constraints.g0.margin=0.3std", "dual.init=one_shot"]
    )
    asked = run.recipe_file.read_text()
    records = play(run, recipe, learner, 2)
    reference = read_parquet(run.reference_file)
    std = reference.loc[reference["split"] == "dual", "g0"].to_numpy().std()
    frozen = yaml.safe_load(run.recipe_file.read_text())["objective"]["constraints"]
    assert (
        frozen[0]["margin"] == "0.3std"
        and frozen[0]["reference_std"] == std
        and frozen[1]["reference_std"] is None
    )
    assert run.recipe().problem.bounds.to_dict() == {"g0": 0.3 * std, "g1": 0.4}
    assert replay(run) == run.state()["lambda"]
    dual = reference[reference["split"] == "dual"].groupby("prompt_id")["g0"].mean().mean()
    assert records[0]["u"]["g0"] == pytest.approx(records[0]["utilities"]["g0"] - dual - 0.3 * std)
    # The same run with that number as its margin moves λ alike; a run killed before its state
    # was written comes out alike.
    plain, *parts = make_run(
        tmp_path / "number" / "run",
        world,
        [f"objective.constraints.g0.margin={float(0.3 * std)!r}", "dual.init=one_shot"],
    )
    play(plain, *parts, 2)
    pd.testing.assert_frame_equal(
        pd.DataFrame(plain.state()["lambda"]), pd.DataFrame(run.state()["lambda"]), rtol=1e-12
    )
    killed, *parts = make_run(
        tmp_path / "killed" / "run",
        world,
        ["objective.constraints.g0.margin=0.3std", "dual.init=one_shot"],
    )
    state = killed.state()
    prepare(killed, *parts, {})
    killed.write_state(state)
    play(killed, killed.recipe(), parts[1], 2)
    assert tables_of(killed) == tables_of(run)
    # The frozen recipe as the recipe of a new run: its unit is measured anew.
    again = init_run(run.recipe_file, tmp_path / "again", [])
    assert (
        again.recipe().problem.unresolved == {"g0": 0.3}
        and again.recipe_file.read_text().count("reference_std: null") == 2
    )
    assert init_run(
        tmp_path / "tabular.yaml",
        tmp_path / "asked",
        ["objective.constraints.g0.margin=0.3std", "dual.init=one_shot"],
    )
    assert (tmp_path / "asked" / "recipe.yaml").read_text() == asked


def test_scores_without_spread_have_no_std(tmp_path):
    world = random_world(5, 1, prompts=20)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["objective.constraints.g0.margin=0.3std"]
    )
    prepare(run, recipe, learner, {})
    constant = read_parquet(run.reference_file).assign(g0=2.0)
    constant.to_parquet(run.reference_file)
    with pytest.raises(
        UserError,
        match="g0: its margin is in std, but all 640 reference responses score 2; give the margin "
        "as a number",
    ):
        prepare(run, recipe, learner, {})


def test_prepare_says_what_a_std_is(tmp_path):
    """On the embedded world, with a clip: words before, numbers after; the exact optimum is that of
    the resolved margin."""
    few = (
        "prompts.max_fit=4",
        "prompts.max_test=2",
        "dual.prompts_per_round=2",
        "dual.responses_per_prompt=32",
        "dual.init=zeros",
    )
    sets = [
        p
        for s in (*SMALL, *few, IN_STD, "objective.constraints.harmless.scorer.clip=[-1,1]")
        for p in ("-s", s)
    ]
    said = cdpo("init", QUICKSTART, tmp_path / "run", *sets, check=0).stdout
    assert "subject to E[harmless] at least 0.5 std of π_ref's scores above π_ref" in said
    prepared = cdpo("prepare", tmp_path / "run", "--json", check=0)
    level = json.loads(prepared.stdout)["levels"]["harmless"]
    reference = read_parquet(tmp_path / "run" / "reference.parquet")
    assert level == pytest.approx(
        0.5 * reference.loc[reference["split"] == "dual", "harmless"].std(ddof=0)
    )
    assert (
        "prepare: scores of helpful: mean " in prepared.stderr
        and "at the bounds of its clip" in prepared.stderr
    )
    assert f"prepare: harmless: margin 0.5std = {level:.4g} score units" in prepared.stderr
    facts = json.loads((tmp_path / "run" / "scorers.json").read_text())["harmless"]
    pool = read_parquet(tmp_path / "run" / "pool" / "reference.parquet")["harmless"]
    assert facts["options"] == "clipped to [-1, 1]" and facts["reference"]["mean"] == pytest.approx(
        pool.mean()
    )
    assert (
        pool.between(-1, 1).all()
        and facts["reference"]["clipped"] == pytest.approx((pool.abs() == 1).mean())
        and facts["reference"]["clipped"] > 0
    )
    exact = json.loads((tmp_path / "run" / "exact.json").read_text())["dual"]
    rise = exact["optimal"]["utilities"]["harmless"] - exact["reference"]["utilities"]["harmless"]
    assert rise == pytest.approx(level, abs=1e-3)
    assert "λ_0 and 0 dual steps recomputed" in cdpo("check", tmp_path / "run", check=0).stdout
