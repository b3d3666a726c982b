"""Recipes with a mistake, kind by kind, through the real command line: one line that says what,
where and what to do; exit 2; no run."""

import pytest
import yaml

from tests.helpers.paths import QUICKSTART


def put(path: str, value: object):
    """A change of a recipe: the value at a dotted key; `...` removes it."""

    def change(raw: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            raw = raw[int(key) if key.isdigit() else key]
        if value is ...:
            del raw[last]
        else:
            raw[int(last) if last.isdigit() else last] = value

    return change


def rename(path: str, new: str):
    """A change of a recipe: another name for a key."""

    def change(raw: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            raw = raw[key]
        raw[new] = raw.pop(last)

    return change


def second_constraint(raw: dict) -> None:
    raw["objective"]["constraints"] *= 2


# A change of the embedded world's recipe, or a whole text, and what the line says.
RECIPES = {
    "unknown key": (put("fit.zzz", 1), "fit.zzz: unknown key"),
    "unknown block": (put("zzz", {"a": 1}), "zzz: unknown key"),
    "misspelt key": (
        rename("dual.step_size", "stepsize"),
        "dual.stepsize: unknown key; did you mean step_size?",
    ),
    "key of another block": (
        put("objective.learning_rate", 1),
        "objective.learning_rate: unknown key; did you mean fit.learning_rate?",
    ),
    "key above its block": (put("steps", 3), "steps: unknown key; did you mean fit.steps?"),
    "key of another type": (
        put("objective.constraints.0.scorer.append_eos", True),
        "scorer.append_eos: unknown key here; another type has it",
    ),
    "missing key": (put("objective.beta", ...), "objective.beta: missing"),
    "word for a number": (put("policy.lora.r", "eight"), "policy.lora.r"),
    "fraction for an integer": (put("seed", 1.5), "seed"),
    "number for a block": (put("dual", 3), "dual"),
    "list for a block": (put("sampling", [1]), "sampling"),
    "null for a block": (put("objective", None), "objective"),
    "block for a list": (put("objective.constraints", {"a": 1}), "objective.constraints"),
    "steps and epochs": (put("fit.epochs", 1), "one of fit.steps and fit.epochs"),
    "margin and threshold": (put("objective.constraints.0.threshold", 1), "exactly one of margin"),
    "neither margin nor threshold": (
        put("objective.constraints.0.margin", None),
        "exactly one of margin",
    ),
    "infinite margin": (
        put("objective.constraints.0.margin", float("inf")),
        "objective.constraints.0.margin",
    ),
    "two constraints of one name": (second_constraint, "harmless is used twice"),
    "constraint named as the reward": (
        put("objective.constraints.0.name", "helpful"),
        "helpful is used twice",
    ),
    "reserved name": (
        put("objective.reward.name", "token_ids"),
        "token_ids is a reserved column name",
    ),
    "name that is no identifier": (put("objective.reward.name", "a b"), "objective.reward.name"),
    "beta 0": (put("objective.beta", 0), "objective.beta"),
    "beta nan": (put("objective.beta", float("nan")), "objective.beta"),
    "negative lambda": (put("dual.init", {"harmless": -1}), "lambda of harmless is -1"),
    "lambda of no constraint": (
        put("dual.init", {"harmful": 1}),
        "unknown harmful; missing harmless",
    ),
    "negative step scale": (put("dual.step_scale", {"harmless": -1}), "dual.step_scale"),
    "fixed lambda without values": (put("dual.method", "fixd"), "dual.method"),
    "temperature 0": (put("sampling.temperature", 0), "sampling.temperature"),
    "top_p over 1": (put("sampling.top_p", 1.5), "sampling.top_p"),
    "no room for a prompt": (put("fit.max_length", 3), "no room for a prompt"),
    "zero pairs": (put("fit.pairs_per_prompt", 0), "fit.pairs_per_prompt"),
    "negative seed": (put("seed", -1), "seed"),
    "unknown dtype": (put("policy.dtype", "float8"), "policy.dtype"),
    "unknown scorer type": (
        put("objective.reward.scorer.type", "pyton"),
        "objective.reward.scorer",
    ),
    "column scorer in a run": (
        put("objective.reward.scorer", {"type": "column", "file": "x", "column": "y"}),
        "cannot score fresh samples",
    ),
    "empty file": (b"", "a recipe is a mapping of keys"),
    "list for a mapping": (b"- name: a\n- seed: 1\n", "a recipe is a mapping of keys"),
    "key twice": (b"name: a\nseed: 1\nseed: 2\n", "'seed' is given twice"),
    "broken YAML": (b"name: [a\n", "not valid YAML"),
    "not UTF-8": ("name: caf\u00e9\n".encode("latin-1"), "not a text file"),
    "NUL byte": (b"name: a\0b\n", "not valid YAML"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipe(kind, refused, tmp_path):
    change, match = RECIPES[kind]
    path = tmp_path / "r.yaml"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        raw = yaml.safe_load(QUICKSTART.read_text())
        change(raw)
        path.write_text(yaml.safe_dump(raw))
    line = refused("init", path, tmp_path / "run", match=match)
    assert str(path) in line and not (tmp_path / "run").exists()


OVERRIDES = {
    "no value": ("fit.steps", "write KEY=VALUE"),
    "no key": ("=3", "write KEY=VALUE"),
    "broken value": ("objective.beta=[1", "not valid YAML"),
    "item that is not there": ("objective.constraints.nothing.margin=1", "no item nothing"),
    "key below a value": ("objective.beta.x=1", "beta is a value"),
    "unknown key": ("dual.stepsize=1", "did you mean step_size?"),
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_override(kind, refused, tmp_path):
    override, match = OVERRIDES[kind]
    refused("init", QUICKSTART, tmp_path / "run", "-s", override, match=match)
    assert not (tmp_path / "run").exists()
