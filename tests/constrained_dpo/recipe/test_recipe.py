"""The recipe: every file in recipes/ loads, mistakes are all shown at once, every key is documented
and read somewhere."""

import ast
import re

import pytest
import yaml

from constrained_dpo.recipe.load import (
    load_recipe,
    read_document,
    recipe_text,
    schema_blocks,
    validated,
)
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from tests.helpers import recipe_keys
from tests.helpers.paths import QUICKSTART, REPO


def test_a_frozen_recipe_keeps_the_users_comments_and_gets_every_key(tmp_path):
    document = read_document(
        QUICKSTART, ["objective.beta=0.5", "prompts={train: a.jsonl, eval: 0.3}"]
    )
    recipe = validated(QUICKSTART, document)
    (tmp_path / "frozen.yaml").write_text(recipe_text(recipe, document))
    text = (tmp_path / "frozen.yaml").read_text()
    assert load_recipe(tmp_path / "frozen.yaml") == recipe
    for comment in re.findall(r"# .*", QUICKSTART.read_text()):
        assert comment in text or "requests" in comment, comment  # prompts was replaced whole
    assert "beta: 0.5\n" in text and "weight_decay: 0.0" in text and "learning_rate: 2e-4" in text
    again = read_document(tmp_path / "frozen.yaml")
    assert recipe_text(recipe, again) == text  # a second resolution changes nothing


def test_a_tag_runs_nothing_and_a_key_is_a_text(tmp_path):
    path, trace = tmp_path / "r.yaml", tmp_path / "trace"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{trace}]\n? [a]\n: 1\n")
    with pytest.raises(UserError, match="name: input should be a valid string"):
        load_recipe(path)
    with pytest.raises(UserError, match="keys should be strings"):
        load_recipe(path)
    assert not trace.exists()


def test_yes_is_a_word_and_a_recipe_may_be_a_mapping():
    recipe = load_recipe(
        QUICKSTART, ["objective.reward.scorer={type: classifier, model: m, label: yes}"]
    )
    assert recipe.scorers["helpful"].label == "yes"
    assert load_recipe(recipe.model_dump(mode="json")) == load_recipe(recipe) == recipe
    with pytest.raises(UserError, match=r"^seed: input should be greater than or equal to 0"):
        load_recipe(recipe.model_dump(mode="json") | {"seed": -1})


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_loads_and_survives_its_own_yaml(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_the_hash_is_of_what_differs_from_the_defaults(tmp_path):
    """A key that a later release adds, at its default, leaves old runs as they are; any value that
    differs is another recipe."""
    recipe = load_recipe(QUICKSTART)
    (tmp_path / "all.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "all.yaml").hash() == recipe.hash()
    assert (
        load_recipe(QUICKSTART, ["fit.weight_decay=0.0", "dual.step_scale={harmless: 2.0}"]).hash()
        == recipe.hash()
    )
    for change in (
        "fit.weight_decay=0.1",
        "dual.step_size=0.4",
        "policy.lora.r=4",
        "objective.constraints.harmless.margin=0.4",
    ):
        assert load_recipe(QUICKSTART, [change]).hash() != recipe.hash(), change


def test_all_errors_are_shown_at_once_with_keys_and_suggestions(tmp_path):
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["fit"]["learning_rat"] = raw["fit"].pop("learning_rate")
    raw["policy"]["lora"]["r"] = "eight"
    raw["objective"]["beta"] = -1
    raw["dual"]["method"] = "newtonian"
    del raw["name"]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "bad.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert any(
        "fit.learning_rat: unknown key; did you mean learning_rate?" in line for line in lines
    )
    assert any("name: missing" in line for line in lines)
    assert any("policy.lora.r" in line and "'eight'" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["fit.epochs=1"], "one of fit.steps and fit.epochs"),
        (["objective.constraints.harmless.threshold=1"], "exactly one of margin"),
        (["objective.constraints.harmless.name=helpful"], "helpful is used twice"),
        (["objective.reward.name=response"], "response is a reserved column name"),
        (["dual.init={harmles: 1}"], "dual.init: lambda: unknown harmles; missing harmless"),
        (["dual.init={harmless: -1}"], "lambda of harmless is -1"),
        (["sampling.max_new_tokens=16"], "no room for a prompt"),
        (
            ["objective.reward.scorer={type: column, file: x, column: y}"],
            "cannot score fresh samples",
        ),
        (["objective.reward.scorer.type=pyton"], "objective.reward.scorer"),
        (
            ["sampling.responses_per_prompt=1"],
            "responses_per_prompt: 1 gives the first round no pair to compare",
        ),
        (["dual.reference_responses=1"], "dual.reference_responses: 1 answer of π_ref to a prompt"),
        (
            ["dual.method=subgradient", "fit.conditional=null", "dual.responses_per_prompt=1"],
            "dual.responses_per_prompt: 1 answer of π_ref to a prompt bounds no u; give at least 2",
        ),
        (
            ["fit.group_size=8", "sampling.responses_per_prompt=4"],
            "4 gives the first round no group of fit.group_size 8",
        ),
        (
            ["fit.group_size=8", "pool.max_per_prompt=4"],
            "pool.max_per_prompt: 4 gives no group of fit.group_size 8",
        ),
        (
            [
                "fit.group_size=8",
                "dual.responses_per_prompt=6",
                "pool.shares={reference: 0.1, recent: 0.7, earlier: 0.2}",
            ],
            "leave a dual prompt 7 in round 1, no group of fit.group_size 8",
        ),
        (
            [
                "fit.group_size=12",
                "dual.responses_per_prompt=9",
                "pool.shares={reference: 0.1, recent: 0.1, earlier: 0.8}",
            ],
            "leave a dual prompt 11 in round 2",
        ),
        (["fit.lr_scheduler=constant"], "constant has no warm-up; take constant_with_warmup"),
        (["fit.steps=10"], "fit.warmup_steps: 10 of 10 steps leaves none"),
        (["fit.steps"], "write KEY=VALUE"),
        (["objective.constraints.nothing.margin=1"], "no item nothing"),
        (["objective.beta.x=1"], "beta is a value, not a block"),
    ],
)
def test_contradictions_are_refused(overrides, match):
    with pytest.raises(UserError, match=re.escape(match)):
        load_recipe(QUICKSTART, overrides)


def test_duplicate_keys_and_broken_yaml_name_the_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nseed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"r\.yaml:3: .*'seed' is given twice"):
        load_recipe(path)
    path.write_text("name: [a\n")
    with pytest.raises(UserError, match=r"r\.yaml:\d: not valid YAML"):
        load_recipe(path)


def test_overrides_reach_lists_by_name_and_scientific_numbers_are_numbers():
    recipe = load_recipe(
        QUICKSTART, ["objective.constraints.harmless.margin=0.7", "fit.learning_rate=5e-4"]
    )
    assert recipe.problem.bounds.to_dict() == {"harmless": 0.7} and recipe.fit.learning_rate == 5e-4


def test_paths_become_absolute_and_train_eval_are_accepted(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "s.py").write_text("def f(p, r): return [0.0] * len(r)\n")
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["prompts"] = {"train": "p.jsonl", "eval": "p.jsonl"}
    raw["objective"]["reward"]["scorer"]["target"] = "s.py:f"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.prompts.source == recipe.prompts.test == str(tmp_path / "p.jsonl")
    assert recipe.objective.reward.scorer.target == f"{tmp_path / 's.py'}:f"


def test_every_key_is_documented_and_read_somewhere():
    """Read as an attribute of something: neither the definition nor a comment or message counts."""
    read = set()
    for path in sorted(
        p for folder in ("constrained_dpo", "data_prep") for p in (REPO / folder).rglob("*.py")
    ):
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    for block in schema_blocks(Recipe).values():
        for key, field in block.model_fields.items():
            assert field.description or key == "type", f"{block.__name__}.{key} has no description"
            assert key in read, f"{block.__name__}.{key} is never read"


def test_the_readme_lists_every_key_as_the_schema_has_it():
    text = recipe_keys.README.read_text()
    for block in schema_blocks(Recipe).values():
        for key in block.model_fields:
            assert f"`{key}`" in text, f"{key} is not in recipes/README.md"
    assert recipe_keys.key_table() in text, (
        "recipes/README.md is behind the schema: run `python -m tests.helpers.recipe_keys`"
    )


def test_every_scorer_type_and_reference_adapter_take_paths_relative_to_the_recipe(tmp_path):
    for name in ("base", "sft", "beaver"):
        (tmp_path / name).mkdir()
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["policy"] |= {"model": "base", "reference_adapter": "sft"}
    raw["objective"]["reward"]["scorer"] = {"type": "beaver", "model": "beaver"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.policy.model, recipe.policy.reference_adapter) == (
        str(tmp_path / "base"),
        str(tmp_path / "sft"),
    )
    assert recipe.objective.reward.scorer.model == str(tmp_path / "beaver")
    raw["policy"]["model"] = "quickstart"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.policy.model, recipe.policy.reference_adapter) == (
        "quickstart",
        str(tmp_path / "sft"),
    )


@pytest.mark.parametrize("beside", ["link", "target"])
def test_a_recipe_that_is_a_link_has_its_files_beside_it_or_beside_its_target(beside, tmp_path):
    folders = {name: tmp_path / name for name in ("link", "target")}
    for folder in folders.values():
        folder.mkdir()
    (folders["target"] / "3f9a0c").write_text(QUICKSTART.read_text())
    (folders["link"] / "r.yaml").symlink_to(folders["target"] / "3f9a0c")
    (folders[beside] / "base").mkdir()
    recipe = load_recipe(folders["link"] / "r.yaml", ["policy.model=base"])
    assert recipe.policy.model == str(folders[beside] / "base")


def test_a_misspelt_key_of_a_beaver_scorer_is_named_without_the_schemas_own_names():
    with pytest.raises(
        UserError,
        match=r"objective\.reward\.scorer\.append_eoss: unknown key; did you mean append_eos\?",
    ):
        load_recipe(
            QUICKSTART, ["objective.reward.scorer={type: beaver, model: x, append_eoss: true}"]
        )


PAPERS = {
    "caid_pku_saferlhf": 35,
    "caid_hh_two_constraints": 35,
    "mocan_pku_saferlhf": 16,
    "dpo_helpful": 16,
    "dpo_safe": 16,
    "weighted_sum_hh": 35,
    "pecaid_pku_saferlhf": 35,
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_comment_every_key_and_pickle_only_where_there_is_nothing_else(name):
    path = REPO / "recipes" / f"{name}.yaml"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        is_block = re.fullmatch(r"\s*(- )?\w+:", line) or re.fullmatch(
            r"\s*(- )?(name|type): \w+", line
        )
        assert is_block or " # " in f" {line.strip()}", f"{path.name}:{number} has no comment"
    recipe = load_recipe(path)
    pickled = {
        scorer.model for scorer in recipe.scorers.values() if getattr(scorer, "allow_pickle", False)
    }
    assert not recipe.policy.allow_pickle and pickled <= {"mohameddhiab/humor-no-humor"}
    assert (
        recipe.sampling.top_p == 0.9
        and recipe.fit.batch_size * recipe.fit.gradient_accumulation == PAPERS[name]
    )
    assert recipe.scorers["harmless"].negate == (
        name in ("caid_pku_saferlhf", "mocan_pku_saferlhf", "dpo_helpful", "dpo_safe")
    )


def test_the_recipes_that_are_compared_share_prompts_policy_and_sampling():
    for family in (
        ("caid_pku_saferlhf", "mocan_pku_saferlhf", "dpo_helpful", "dpo_safe"),
        ("caid_hh_two_constraints", "weighted_sum_hh"),
    ):
        first, *others = (load_recipe(REPO / "recipes" / f"{name}.yaml") for name in family)
        for other in others:
            assert (other.policy, other.prompts, other.sampling, other.scorers) == (
                first.policy,
                first.prompts,
                first.sampling,
                first.scorers,
            )


def test_the_readme_has_a_section_for_every_recipe():
    text = recipe_keys.README.read_text()
    for path in (REPO / "recipes").glob("*.yaml"):
        assert f"| `{path.name}` |" in text, f"{path.name} is not in the table of recipes/README.md"
