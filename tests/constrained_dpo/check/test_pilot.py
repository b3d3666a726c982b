"""The pilot of `cdpo check`: expected precision, time and memory; margins out of reach and in
std."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from constrained_dpo.check.check import check_recipe
from constrained_dpo.check.precision import expected_precision, prompt_variance, variance_components
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.report.check_words import print_check
from tests.helpers.paths import QUICKSTART

PLAIN = "policy.quantization=none"


@pytest.fixture(scope="module")
def report():
    return check_recipe(load_recipe(QUICKSTART, [PLAIN]), pilot=True, target_se={"harmless": 0.01})


def test_a_valid_recipe_is_described(report):
    assert report.prompts == {"dual": 48, "test": 24}
    assert report.not_checked == report.warnings == []
    lengths = report.lengths
    assert lengths.longest_prompt == lengths.max_new_tokens == 3
    assert (lengths.max_length, lengths.policy_window) == (16, 32)
    assert lengths.example == "boss win game" and lengths.scorers == {}
    harmless = report.scorers["harmless"]
    assert harmless.polite > harmless.rude
    assert harmless.direction == "higher for the polite answer"
    assert 0.1 < report.pilot.peak_gib < 24
    assert json.loads(json.dumps(report.to_json()))["pilot"]["margins"] == {}


def test_expected_error_and_time_of_the_embedded_world(report):
    """Measured after round 0 of this recipe: u has a standard error of 0.017 on the dual prompts
    (48 prompts × 256 responses)."""
    harmless = report.pilot.precision["harmless"]
    assert 0.5 < harmless.std_within < 1.5 and 0.008 < harmless.se["dual"] < 0.04
    assert harmless.se["test"] == pytest.approx(harmless.se["dual"] * math.sqrt(2))
    assert harmless.prompts_needed == math.ceil(48 * (harmless.se["dual"] / 0.01) ** 2)
    seconds = report.pilot.seconds
    assert set(seconds) == {"prepare", "fit", "rescore", "run"} and min(seconds.values()) > 0
    rounds = 7 * (seconds["fit"] + seconds["rescore"])
    assert seconds["run"] == pytest.approx(seconds["prepare"] + rounds)


def test_a_margin_out_of_reach_is_said_and_one_in_std_is_a_number_by_the_pilots_samples():
    harmless = "objective.constraints.harmless"
    settings = [PLAIN, f"{harmless}.margin=20std", f"{harmless}.scorer.clip=[-1,0.9]"]
    recipe = load_recipe(QUICKSTART, settings)
    report = check_recipe(recipe, pilot=True, target_se={})
    facts, (number, std) = report.pilot.scores["harmless"], report.pilot.margins["harmless"]
    assert number == 20 and std == facts["std"] > 0
    assert facts["max"] == 0.9 and 0 < facts["clipped"] < 1
    (line,) = report.warnings
    level = facts["mean"] + 20 * std
    assert line.startswith(
        f"harmless: no tilt of the pilot's samples of π_ref reaches its level {level:.3g}, the "
        "best reaches 0."
    )
    console = Console(width=200, file=io.StringIO())
    print_check(console, report, recipe)
    words = console.file.getvalue()
    assert f"harmless: margin 20std = {20 * std:.4g} score units" in words
    assert "scorer of harmless (python, clipped to [-1, 0.9])" in words
    assert f"scores of harmless: mean {facts['mean']:.3g}, std {std:.3g} (within prompts" in words
    assert "% at the bounds of its clip" in words


def test_variance_components_and_the_expected_error_against_simulation():
    """Drawn from the model that `prompt_variance` assumes: the mean over many studies of u's spread
    is the stated standard error."""
    rng = np.random.default_rng(0)
    prompts, drawn, studies, margin = 40, 6, 3000, 0.8
    variances = rng.gamma(4.0, 0.25, size=4000)  # mean 1, squared coefficient of variation 1/4
    means = rng.normal(scale=0.7, size=4000)
    frame = pd.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(4000), drawn),
            "g": (means + np.sqrt(variances) * rng.normal(size=(drawn, 4000))).T.ravel(),
        }
    )
    components = variance_components(frame, ["g"])
    assert components.loc["g", "within"] == pytest.approx(1.0, rel=0.05)
    assert components.loc["g", "between"] == pytest.approx(0.49, rel=0.1)
    assert components.loc["g", "spread"] == pytest.approx(0.25, rel=0.2)
    rows = rng.integers(0, 4000, size=(studies, prompts))
    noise = np.sqrt(variances[rows] / drawn)
    gain = margin * variances[rows]
    first, second = (means[rows] + noise * rng.normal(size=rows.shape) for _ in range(2))
    relative = ConstrainedProblem("r", 1.0, (Constraint("g", margin=margin),))
    simulated = (first + gain - second).mean(axis=1).std()
    assert math.sqrt(prompt_variance(components, relative, drawn)["g"] / prompts) == pytest.approx(
        simulated, rel=0.05
    )
    absolute = ConstrainedProblem("r", 1.0, (Constraint("g", threshold=-5.0),))
    assert math.sqrt(prompt_variance(components, absolute, drawn)["g"] / prompts) == pytest.approx(
        first.mean(axis=1).std(), rel=0.05
    )
    expect = lambda problem: expected_precision(
        frame,
        problem,
        responses_per_prompt=drawn,
        prompts=pd.DataFrame({"dual": {"g": prompts}}),
        target_se={},
    )["g"]
    assert expect(relative).target_se == pytest.approx(margin / 10)
    assert expect(absolute).target_se is None and expect(absolute).prompts_needed is None
