"""The scale of the scores in `cdpo check`: the figures by brute force at std 0.1, 1 and 10, and
what is said of them."""

import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from constrained_dpo.check.check import CheckReport
from constrained_dpo.estimates.score_scale import initial_multipliers, score_scale
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.report.check_words import describe_scale, print_check
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, REPO
from tests.helpers.tables import scored_frame

PROBLEM = ConstrainedProblem("r", 0.2, (Constraint("g", margin=0.1),))
LAMBDA = pd.Series({"g": 0.5})


def frame_of(std):
    """Ragged prompts that differ in level by much more than their responses do; s = r + 0.5 g has
    this std within a prompt."""
    table = scored_frame(0, 300, 9).sample(frac=0.8, random_state=0)
    level = table["prompt_id"].str[1:].astype(int)
    return table.assign(
        r=std * table["r"] / np.hypot(1, 0.5) + level, g=std * table["g"] / np.hypot(1, 0.5)
    )


def fit(**changes):
    return load_recipe(QUICKSTART).fit.model_copy(update=changes)


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_figures_are_those_of_all_pairs(std):
    table = frame_of(std)
    scale = score_scale(table, PROBLEM, LAMBDA, "dual.init")
    groups = [s.to_numpy() for _, s in (table["r"] + 0.5 * table["g"]).groupby(table["prompt_id"])]
    prob = np.array(
        [1 / (1 + np.exp(-abs(a - b))) for s in groups for a, b in itertools.combinations(s, 2)]
    )
    assert scale.saturated == (prob > 0.99).mean() and scale.tied == (prob < 0.6).mean()
    within = np.sqrt(np.mean([s.var(ddof=1) for s in groups if len(s) > 1]))
    assert scale.std_within == pytest.approx(within) == pytest.approx(std, rel=0.05)
    assert scale.beta_over_std == pytest.approx(0.2 / within) and scale.lambda_ == {"g": 0.5}


def test_what_is_said_at_each_scale():
    words = {
        std: describe_scale(score_scale(frame_of(std), PROBLEM, LAMBDA, "dual.init"), 0.2, fit())
        for std in (0.1, 1.0, 10.0)
    }
    assert [len(words[std]) for std in (0.1, 1.0, 10.0)] == [2, 1, 2]
    assert "at dual.init: g 0.5" in words[1.0][0] and "β/std 0.198; 0 %" in words[1.0][0]
    tied, saturated = words[0.1][1], words[10.0][1]
    assert "close to 1/2" in tied and "bernoulli" in tied and "here" not in tied
    assert "fit.loss: listwise with fit.group_size: 8" in saturated
    assert "divided by one number (by 10: std 1, β 0.02)" in saturated
    assert "quickstart_std10.yaml" in saturated and "which was not measured" in saturated
    saturated = score_scale(frame_of(10.0), PROBLEM, LAMBDA, "dual.init")
    assert (
        len(describe_scale(saturated, 0.2, fit(loss="listwise", group_size=8))) == 1
    )  # nothing more to recommend
    tied = score_scale(frame_of(0.1), PROBLEM, LAMBDA, "dual.init")
    assert "fit.labels is bernoulli here" in describe_scale(tied, 0.2, fit(labels="bernoulli"))[1]
    same = score_scale(frame_of(1.0).assign(r=1.0, g=0.0), PROBLEM, LAMBDA, "dual.init")
    assert same.beta_over_std is None and "score the same" in describe_scale(same, 0.2, fit())[0]


def test_dividing_scores_and_beta_keeps_the_ratio_and_softens_the_labels():
    table = frame_of(10.0)
    divided = table.assign(r=table["r"] / 10, g=table["g"] / 10)
    before = score_scale(table, PROBLEM, LAMBDA, "")
    after = score_scale(
        divided, ConstrainedProblem("r", 0.02, (Constraint("g", margin=0.01),)), LAMBDA, ""
    )
    assert after.beta_over_std == pytest.approx(before.beta_over_std)
    assert before.saturated > 0.7 and after.saturated < 0.01


def test_the_multipliers_are_those_of_the_recipe_or_zero():
    assert initial_multipliers({"g": 0.3}, PROBLEM)[0]["g"] == 0.3
    assert initial_multipliers("zeros", PROBLEM)[1] == "dual.init"
    unknown, words = initial_multipliers("one_shot", PROBLEM)
    assert unknown["g"] == 0 and words.startswith("λ = 0") and "not known before `prepare`" in words


def test_check_says_it_of_a_recipe():
    """Its JSON is the report, from which the words are printed too."""
    path = REPO / "recipes" / "quickstart_std10.yaml"
    small = ["sampling.batch_size=128", "dual.init={harmless: 0.7}", "fit.loss=logistic"]
    small += ["policy.quantization=none"]
    words = [word for setting in small for word in ("-s", setting)]
    printed = cdpo("check", path, *words, "--json", check=0).stdout
    report = CheckReport.from_json(json.loads(printed))
    scale = report.pilot.scale
    assert scale.lambda_ == {"harmless": 0.7} and scale.lambda_is == "dual.init"
    assert scale.std_within > 5 and scale.saturated > 0.3
    console = Console(width=200, file=io.StringIO())
    print_check(console, report, load_recipe(path, small))
    assert "fit.loss: listwise with fit.group_size: 8" in console.file.getvalue()


def test_check_says_it_of_a_run(small_run):
    words = cdpo("check", small_run.path, check=0).stdout
    assert "at λ_0 of the run: harmless" in words and "β/std" in words and "listwise" not in words
    scale = json.loads(cdpo("check", small_run.path, "--json", check=0).stdout)["scale"]
    assert scale["lambda"] == small_run.state().lambda_[0] and 0.5 < scale["std_within"] < 2
