"""`margin: 0.5std`: what a recipe takes, what `prepare` freezes, that λ is recomputed from the
frozen recipe, what is printed."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.problem import Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import read_optimum, replay
from constrained_dpo.run.scorer_facts import read_scorer_facts
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet
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
    frozen = recipe.with_reference_stds({"harmless": 3.0})
    assert (
        frozen.problem.bounds["harmless"] == pytest.approx(3 * level)
        and frozen.hash() == recipe.hash()
    )
    assert recipe.hash() != load_recipe(QUICKSTART).hash()


@pytest.mark.parametrize("value", ["std", "0.5sd", "nanstd", "half", ".inf", "[1]"])
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


IN_STD_0 = ["objective.constraints.g0.margin=0.3std", "dual.init=one_shot"]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A round with g0's margin in std and g1's as a number; its world, its recipe.yaml before
    `prepare`, and its records."""
    world, folder = random_world(5, 2, prompts=20), tmp_path_factory.mktemp("std")
    run, recipe, learner = make_run(folder / "run", world, IN_STD_0)
    text = run.recipe_file.read_text()
    return world, run, text, play(run, recipe, learner, 1)


def dual_std(run) -> float:
    """std of π_ref's scores on the dual prompts in reference.parquet."""
    reference = read_parquet(run.reference_file)
    return reference.loc[reference["split"] == "dual", "g0"].to_numpy().std()


def test_prepare_freezes_the_unit_and_lambda_is_recomputed_from_it(frozen):
    _, run, _, records = frozen
    std = dual_std(run)
    first, second = yaml.safe_load(run.recipe_file.read_text())["objective"]["constraints"]
    assert first["margin"] == "0.3std" and first["reference_std"] == std
    assert second["reference_std"] is None
    assert run.recipe().problem.bounds.to_dict() == {"g0": 0.3 * std, "g1": 0.4}
    assert replay(run) == run.state().lambda_
    reference = read_parquet(run.reference_file)
    test = reference[reference["split"] == "test"].groupby("prompt_id")["g0"].mean().mean()
    slack = records[0].test.utilities["g0"] - test - 0.3 * std
    assert records[0].test.u["g0"] == pytest.approx(slack)


def test_a_margin_in_std_moves_lambda_as_its_number_does(tmp_path, frozen):
    world, run, _, _ = frozen
    number = float(0.3 * dual_std(run))
    settings = [f"objective.constraints.g0.margin={number!r}", "dual.init=one_shot"]
    plain, recipe, learner = make_run(tmp_path / "run", world, settings)
    play(plain, recipe, learner, 1)
    lambdas = [pd.DataFrame(each.state().lambda_) for each in (plain, run)]
    pd.testing.assert_frame_equal(*lambdas, rtol=1e-12)


def test_a_run_killed_before_its_state_was_written_comes_out_alike(tmp_path, frozen):
    world, run, _, _ = frozen
    killed, recipe, learner = make_run(tmp_path / "run", world, IN_STD_0)
    state = killed.state()
    prepare(killed, recipe, learner, {})
    killed.write_state(state)
    play(killed, killed.recipe(), learner, 1)
    assert tables_of(killed) == tables_of(run)


def test_the_frozen_recipe_as_a_new_runs_recipe_has_its_unit_measured_anew(tmp_path, frozen):
    _, run, before, _ = frozen
    again = init_run(run.recipe_file, tmp_path / "again", [])
    assert again.recipe().problem.unresolved == {"g0": 0.3}
    assert again.recipe_file.read_text().count("reference_std: null") == 2
    init_run(run.path.parent / "tabular.yaml", tmp_path / "new", IN_STD_0)
    assert (tmp_path / "new" / "recipe.yaml").read_text() == before


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
    few = ["prompts.max_fit=4", "prompts.max_test=2", "dual.prompts_per_round=2"]
    few += ["dual.responses_per_prompt=32", "dual.init=zeros", "policy.quantization=none"]
    clip = "objective.constraints.harmless.scorer.clip=[-1,1]"
    sets = [word for s in (*SMALL, *few, IN_STD, clip) for word in ("-s", s)]
    run = RunDirectory(tmp_path / "run")
    words = cdpo("init", QUICKSTART, run.path, *sets, check=0).stdout
    assert "subject to E[harmless] at least 0.5 std of π_ref's scores above π_ref" in words
    level = json.loads(cdpo("prepare", run.path, "--json", check=0).stdout)["levels"]["harmless"]
    reference = read_parquet(run.reference_file)
    std = reference.loc[reference["split"] == "dual", "harmless"].std(ddof=0)
    assert level == pytest.approx(0.5 * std)

    lines = cdpo("prepare", run.path, check=0).stdout.splitlines()
    assert lines[0].startswith("scores of helpful: mean ")
    assert lines[1].startswith("scores of harmless: mean ")
    assert lines[1].endswith("at the bounds of its clip")
    assert f"harmless: margin 0.5std = {level:.4g} score units" in lines[2]

    facts = read_scorer_facts(run)["harmless"]
    pool = read_parquet(run.pool_file(None))["harmless"]
    assert facts.options == "clipped to [-1, 1]" and pool.between(-1, 1).all()
    assert facts.reference["mean"] == pytest.approx(pool.mean())
    assert facts.reference["clipped"] == pytest.approx((pool.abs() == 1).mean())
    assert facts.reference["clipped"] > 0
    exact = read_optimum(run)["dual"]
    rise = exact.optimal.utilities["harmless"] - exact.reference.utilities["harmless"]
    assert rise == pytest.approx(level, abs=1e-3)
    assert "λ_0 and 0 dual steps recomputed" in cdpo("check", run.path, check=0).stdout
