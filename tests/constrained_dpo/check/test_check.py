"""`cdpo check`: every local mistake in one go, nothing downloaded, the probe of direction, expected
precision and time."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml
from constrained_dpo.report.check_words import print_check
from rich.console import Console

from constrained_dpo.check.check import check_recipe, needs_download
from constrained_dpo.check.precision import expected_precision, prompt_variance, variance_components
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, RECIPES


def write_recipe(folder, **blocks):
    """The quickstart recipe with whole blocks replaced."""
    raw = yaml.safe_load(QUICKSTART.read_text()) | blocks
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_every_local_mistake_is_shown_at_once(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "s.py").write_text("def f(p, r): return [0.0] * len(r)\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    objective = {
        "beta": 0.1,
        "reward": {
            "name": "helpful",
            "scorer": {"type": "python", "target": str(tmp_path / "s.py") + ":g"},
        },
        "constraints": [
            {
                "name": "harmless",
                "margin": 0.5,
                "scorer": {"type": "classifier", "model": str(tmp_path / "half")},
            }
        ],
    }
    prompts = {"source": str(tmp_path / "bad.jsonl"), "test": str(tmp_path / "none.jsonl")}
    path = write_recipe(
        tmp_path, policy={"model": str(tmp_path / "half")}, prompts=prompts, objective=objective
    )
    lines = cdpo("check", path, "--target-se", "harmles=0.1", check=2).stderr.strip().splitlines()
    expected = (
        "--target-se harmles",
        "line 2",
        "none.jsonl: no such file",
        "policy.model",
        "has no function g",
        "scorer",
    )
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith("error: ") and part in line


def test_prompts_too_long_are_an_error_beside_the_others(tmp_path):
    objective = yaml.safe_load(QUICKSTART.read_text())["objective"]
    objective["reward"]["scorer"]["target"] = "data_prep.quickstart:nothing"
    path = write_recipe(tmp_path, objective=objective)
    lines = (
        cdpo("check", path, "-s", "fit.max_length=5", "--no-pilot", check=2)
        .stderr.strip()
        .splitlines()
    )
    assert (
        len(lines) == 2
        and "no function nothing" in lines[0]
        and "longer than fit.max_length 5" in lines[1]
    )


def test_what_needs_a_download_is_listed_and_the_rest_is_checked(tmp_path):
    scorer = {"type": "classifier", "model": "nobody-here/no-such-reward-model"}
    objective = {"beta": 0.1, "reward": {"name": "helpful", "scorer": scorer}, "constraints": []}
    prompts = {
        "source": {"dataset": "nobody-here/no-such-prompts"},
        "test": {"dataset": "quickstart", "split": "test"},
    }
    path = write_recipe(
        tmp_path,
        policy={"model": "nobody-here/no-such-policy"},
        prompts=prompts,
        objective=objective,
    )
    found = json.loads(cdpo("check", path, "--json", check=0).stdout)
    assert [line.split(":")[0] for line in found["not_checked"]] == [
        "prompts.source",
        "policy.model",
        "scorer of helpful",
    ]
    words = cdpo("check", path, check=0).stdout
    assert words.count("needs a download") == 3 and "valid as far as it was checked" in words
    prompts["test"] = str(tmp_path / "none.jsonl")
    path = write_recipe(
        tmp_path,
        policy={"model": "nobody-here/no-such-policy"},
        prompts=prompts,
        objective=objective,
    )
    assert "none.jsonl: no such file" in cdpo("check", path, check=2).stderr


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_checked_offline_and_what_needs_a_download_is_listed(path):
    """All that a recipe takes from elsewhere is either validated or said to be not checked; nothing
    of a hub recipe is wrong."""
    recipe = load_recipe(path)
    found = check_recipe(recipe, pilot=False, target_se={})
    unchecked = {line.split(":")[0] for line in found["not_checked"]}
    if recipe.policy.model == "quickstart":
        assert (
            not unchecked
            and found["prompts"]["test"] == 24
            and set(found["scorers"]) == set(recipe.problem.objectives)
        )
        return
    assert {
        "prompts.source",
        "prompts.test",
        "policy.model",
        *(f"scorer of {name}" for name in recipe.scorers),
    } <= unchecked
    assert (recipe.policy.reference_adapter is not None) == (
        "policy.reference_adapter" in unchecked
    )
    assert found["scorers"] == {} and "policy" not in found


def test_local_paths_need_no_download(tmp_path):
    assert (
        not needs_download(str(tmp_path), None)
        and not needs_download("./nowhere", None)
        and not needs_download("quickstart", None)
    )
    assert not needs_download("not a hub id", None) and needs_download(
        "nobody-here/no-such-model", None
    )


@pytest.fixture(scope="module")
def quickstart_report():
    return check_recipe(load_recipe(QUICKSTART), pilot=True, target_se={"harmless": 0.01})


def test_a_valid_recipe_is_described(quickstart_report):
    found = quickstart_report
    assert found["prompts"] == {"dual": 48, "test": 24} and found["not_checked"] == []
    assert found["lengths"] | {"scorers": {}} == {
        "longest_prompt": 3,
        "max_new_tokens": 3,
        "max_length": 16,
        "policy_window": 32,
        "scorers": {},
        "example": "boss win game",
    }
    harmless = found["scorers"]["harmless"]
    assert (
        harmless["polite"] > harmless["rude"]
        and harmless["direction"] == "higher for the polite answer"
    )
    assert 0.1 < found["pilot"]["peak_gib"] < 24
    json.dumps(found)


def test_expected_error_and_time_of_the_embedded_world(quickstart_report):
    """Measured after round 0 of this recipe: u has a standard error of 0.017 on the dual prompts
    (48 prompts × 256 responses)."""
    pilot = quickstart_report["pilot"]
    harmless = pilot["precision"]["harmless"]
    assert 0.5 < harmless["std_within"] < 1.5 and 0.008 < harmless["se"]["dual"] < 0.04
    assert harmless["se"]["test"] == pytest.approx(harmless["se"]["dual"] * math.sqrt(2))
    assert harmless["prompts_needed"] == math.ceil(48 * (harmless["se"]["dual"] / 0.01) ** 2)
    seconds = pilot["seconds"]
    assert seconds["run"] == pytest.approx(
        seconds["prepare"] + 7 * (seconds["fit"] + seconds["rescore"])
    )
    assert set(seconds) == {"prepare", "fit", "rescore", "run"} and min(seconds.values()) > 0


def test_no_pilot_samples_nothing_and_a_negated_scorer_turns_round():
    recipe = load_recipe(QUICKSTART, ["objective.constraints.harmless.scorer.negate=true"])
    found = check_recipe(recipe, pilot=False, target_se={})
    assert "pilot" not in found
    assert found["scorers"]["harmless"]["direction"].startswith("higher for the rude answer")


def test_a_scorer_that_cannot_score_is_an_error_of_the_recipe(tmp_path):
    bodies = {
        "[float(x.split()[3] == 'it') for x in r]": "IndexError",
        "[1.0]": "shape",
        "[float('nan')] * len(r)": "finite",
    }
    for body, match in bodies.items():
        (tmp_path / "s.py").write_text(f"def f(p, r): return {body}\n")
        recipe = load_recipe(
            QUICKSTART, [f"objective.constraints.harmless.scorer.target='{tmp_path / 's.py'}:f'"]
        )
        with pytest.raises(UserError, match=match):
            check_recipe(recipe, pilot=False, target_se={})
        (tmp_path / "s.py").unlink()


def test_a_margin_out_of_reach_is_said_and_one_in_std_is_a_number_by_the_pilots_samples(
    quickstart_report,
):
    assert quickstart_report["warnings"] == [] and quickstart_report["pilot"]["margins"] == {}
    recipe = load_recipe(
        QUICKSTART,
        [
            "objective.constraints.harmless.margin=20std",
            "objective.constraints.harmless.scorer.clip=[-1,0.9]",
        ],
    )
    report = check_recipe(recipe, pilot=True, target_se={})
    facts, (number, std) = (
        report["pilot"]["scores"]["harmless"],
        report["pilot"]["margins"]["harmless"],
    )
    assert (
        number == 20
        and std == facts["std"] > 0
        and facts["max"] == 0.9
        and 0 < facts["clipped"] < 1
    )
    (line,) = report["warnings"]
    level = facts["mean"] + 20 * std
    assert line.startswith(
        f"harmless: no tilt of the pilot's samples of π_ref reaches its level {level:.3g}, the "
        "best reaches 0."
    )
    console = Console(width=200, file=io.StringIO())
    print_check(console, report)
    words = console.file.getvalue()
    assert (
        f"harmless: margin 20std = {20 * std:.4g} score units" in words
        and "scorer of harmless (python, clipped to [-1, 0.9])" in words
    )
    assert (
        f"scores of harmless: mean {facts['mean']:.3g}, std {std:.3g}, quantiles" in words
        and "% at the bounds of its clip" in words
    )


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
    found = expected_precision(
        frame, relative, responses_per_prompt=drawn, prompts={"dual": prompts}, target_se={}
    )
    assert found["g"]["target_se"] == pytest.approx(margin / 10)
    found = expected_precision(
        frame, absolute, responses_per_prompt=drawn, prompts={"dual": prompts}, target_se={}
    )
    assert found["g"]["target_se"] is None and found["g"]["prompts_needed"] is None
