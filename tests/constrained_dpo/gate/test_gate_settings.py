"""gate.yaml: strict, documented, all errors at once."""

import ast

import pytest

from constrained_dpo.gate.settings import GateSettings, load_gate
from constrained_dpo.recipe.load import load_recipe, schema_blocks
from data_prep.errors import UserError
from tests.helpers import recipe_keys
from tests.helpers.paths import REPO

SCORER = {"type": "python", "target": "a.py:f"}


def test_all_mistakes_are_told_at_once_with_a_suggestion(tmp_path):
    file = tmp_path / "gate.yaml"
    file.write_text(
        "confidnce: 0.9\nchecks:\n  length: {}\n  refusal: {prompts: b.jsonl, increase: 2}\n"
    )
    with pytest.raises(UserError) as error:
        load_gate(file)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    for words in ("did you mean confidence?", "give one of ratio and increase", "less than 1"):
        assert any(words in line for line in lines), lines


def test_a_check_outside_its_block_is_told_where_it_belongs(tmp_path):
    file = tmp_path / "gate.yaml"
    file.write_text("length: {ratio: 1.2}\n")
    with pytest.raises(UserError, match=r"length: unknown key; did you mean checks\.length\?"):
        load_gate(file)


@pytest.mark.parametrize(
    ("checks", "match"),
    [
        (
            {"second_opinion": [{"name": "a", "scorer": {"type": "python", "target": "a.py:f"}}]},
            "one of no_worse_by",
        ),
        (
            {"refusal": {"prompts": "b", "scorer": {"type": "python", "target": "a.py:f"}}},
            "set indicator",
        ),
        ({"constraints": [{"name": "a"}, {"name": "a"}]}, "stands there twice"),
        ({"cut_off": {"share": 0.1, "increase": 0.1}}, "one of share and increase"),
    ],
)
def test_checks_that_say_two_things_or_nothing_are_refused(checks, match):
    with pytest.raises(UserError, match=match):
        load_gate({"checks": checks})


def test_every_key_is_documented_and_read():
    read = {
        node.attr
        for path in (REPO / "constrained_dpo" / "gate").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for block in schema_blocks(GateSettings).values():
        if block.__module__ == GateSettings.__module__:
            for key, field in block.model_fields.items():
                assert field.description, f"{block.__name__}.{key} has no description"
                assert key in read, f"{block.__name__}.{key} is never read"


def test_the_guide_lists_every_key_as_the_schema_has_it():
    assert recipe_keys.gate_table() in recipe_keys.GATE.read_text(), (
        "docs/guide/gate.md is behind the schema: run `python -m tests.helpers.recipe_keys`"
    )


def test_the_guides_gate_is_one():
    text = recipe_keys.GATE.read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    from data_prep.settings import parse_yaml

    checks = load_gate(parse_yaml(block)).checks
    assert checks.capability[0].name == "gsm8k/exact_match,strict-match"


@pytest.mark.parametrize("path", (REPO / "recipes" / "gates").glob("*.yaml"), ids=lambda p: p.stem)
def test_the_gates_that_ship_are_gates(path):
    checks = load_gate(path).checks
    trained = load_recipe(REPO / "recipes" / path.name).scorers.values()
    targets = {getattr(settings, "target", None) for settings in trained}
    assert targets.isdisjoint(check.scorer.target for check in checks.second_opinion)
