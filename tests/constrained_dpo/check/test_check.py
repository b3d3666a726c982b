"""`cdpo check`: every local mistake in one go, nothing downloaded, the probe of direction."""

import json

import pytest
import yaml

from constrained_dpo.check.check import check_recipe
from constrained_dpo.check.downloads import needs_download
from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from tests.helpers.cli import cdpo
from tests.helpers.models import save_tiny_causal_lm
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
    for line, message in zip(lines, expected, strict=True):
        assert line.startswith("error: ") and message in line


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
    report = json.loads(cdpo("check", path, "--json", check=0).stdout)
    assert [line.split(":")[0] for line in report["not_checked"]] == [
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
    if path.stem == "smollm2":  # its model is a folder that `make smollm2` writes
        with pytest.raises(UserError, match=r"policy\.model: \./runs/smollm2.* is not a folder"):
            check_recipe(recipe, pilot=False, target_se={})
        return
    report = check_recipe(recipe, pilot=False, target_se={})
    unchecked = {line.split(":")[0] for line in report.not_checked}
    if recipe.policy.model == "quickstart":
        assert not unchecked and report.prompts["test"] == 24
        assert set(report.scorers) == set(recipe.problem.objectives)
        return
    keys = {"prompts.source", "prompts.test", "policy.model"}
    assert keys | {f"scorer of {name}" for name in recipe.scorers} <= unchecked
    adapter = recipe.policy.reference_adapter is not None
    assert adapter == ("policy.reference_adapter" in unchecked)
    assert report.scorers == {} and report.policy is None


def test_local_paths_need_no_download(tmp_path):
    for here in (str(tmp_path), "./nowhere", "quickstart", "not a hub id"):
        assert not needs_download(here, None)
    assert needs_download("nobody-here/no-such-model", None)


def test_no_pilot_samples_nothing_and_a_negated_scorer_turns_round():
    recipe = load_recipe(QUICKSTART, ["objective.constraints.harmless.scorer.negate=true"])
    report = check_recipe(recipe, pilot=False, target_se={})
    assert report.pilot is None
    assert report.scorers["harmless"].direction.startswith("higher for the rude answer")


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


def test_a_policy_whose_template_writes_the_date_is_named_with_the_date_it_writes(tmp_path):
    save_tiny_causal_lm(tmp_path)
    (tmp_path / "s.py").write_text("def f(p, r): return [float(len(x)) for x in r]\n")
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scorer = {"type": "python", "target": str(tmp_path / "s.py") + ":f"}
    path = write_recipe(
        tmp_path,
        policy={"model": str(tmp_path), "quantization": "none", "dtype": "float32"},
        prompts={"source": str(tmp_path / "p.jsonl"), "test": 0.3, "format": "chat"},
        objective={"beta": 1, "reward": {"name": "long", "scorer": scorer}, "constraints": []},
    )
    template = tmp_path / "chat_template.jinja"
    for clock, warned in (("", 0), ("{{ strftime_now('%d %b %Y') }} ", 1)):
        template.write_text(clock + "{{ messages[0]['content'] }}")
        report = check_recipe(load_recipe(path), pilot=False, target_se={})
        lines = [line for line in report.warnings if "writes the date" in line]
        assert len(lines) == warned and all("01 Jan 2026" in line for line in lines)
