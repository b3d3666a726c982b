"""`cdpo new`: recipes about tiny real models, read back by the schema; mistakes in one line."""

import json
import os
import re
import shutil
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest

from constrained_dpo.draft.lines import shown
from constrained_dpo.draft.recipe import test_share as share_of  # no test of its own
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.schema import Recipe
from data_prep.settings import Settings, parse_yaml
from tests.helpers.cli import cdpo
from tests.helpers.models import save_classifier, save_tiny_causal_lm
from tests.helpers.paths import RECIPES
from tests.helpers.terminal import open_terminal

WORDS = " ".join(f"w{i}" for i in range(60))

SCORERS = """
def many(prompts, responses):
    return [float(len(set(r.split()))) for r in responses]

def brief(prompts, responses):
    return [-len(r.split()) / 10 for r in responses]

def same(prompts, responses):
    return [1.0] * len(responses)

def broken(prompts, responses):
    raise RuntimeError("no table")
"""

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

GIVEN = ("--policy", "policy", "--prompts", "prompts.csv", "--reward", "scorers.py:many")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A language model, the same with a chat template, and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_causal_lm(folder / "policy")
    shutil.copytree(folder / "policy", folder / "chatty")
    (folder / "chatty/chat_template.jinja").write_text(CHAT)
    save_classifier(folder / "judge", WORDS)
    save_classifier(folder / "labels", WORDS, labels=3)
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A folder as a user has it, and the working directory."""
    for model in models.iterdir():
        shutil.copytree(model, tmp_path / model.name)
    rows = "\n".join(f"w{i} w{i % 7} w{i % 11}" for i in range(59))
    (tmp_path / "prompts.csv").write_text(f"prompt\n{rows}\nw0 w0 w0\n")
    (tmp_path / "scorers.py").write_text(SCORERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def repeated(block: type[Settings], content: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of a document that say what the schema says anyway."""
    found = []
    for key, value in content.items():
        field = block.model_fields[key]
        inner = [t for t in _classes(field.annotation) if isinstance(value, dict)]
        if inner:
            kind = value.get("type")
            fitting = next(t for t in inner if kind in (None, _type_of(t)))
            found += repeated(fitting, value, f"{prefix}{key}.")
        elif not field.is_required() and field.get_default(call_default_factory=True) == value:
            found.append(prefix + key)
    return found


def _classes(annotation: Any) -> list[type[Settings]]:
    if get_origin(annotation) in (Union, UnionType) or hasattr(annotation, "__metadata__"):
        return [c for argument in get_args(annotation) for c in _classes(argument)]
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return []


def _type_of(block: type[Settings]) -> str | None:
    field = block.model_fields.get("type")
    return None if field is None else get_args(field.annotation)[0]


def unexplained(text: str, given: set[str]) -> list[str]:
    """Lines with a value and without a comment, behind it or above it, of keys that nobody gave."""
    lines, bare = text.splitlines(), []
    for before, line in zip(["", *lines], lines, strict=False):
        match = re.match(r" *(?:- )?(\w+): *[^ #]", line)
        if match and match[1] not in given and "#" not in line and "#" not in before:
            bare.append(line)
    return bare


def test_a_recipe_says_what_was_seen_and_why(here):
    cdpo("new", "mine.yaml", *GIVEN, "--constraint", "scorers.py:brief", check=0)
    text = (here / "mine.yaml").read_text()
    recipe = load_recipe(here / "mine.yaml")
    assert recipe.policy.model == str(here / "policy")
    assert (recipe.policy.quantization, recipe.policy.dtype) == ("none", "float32")
    assert recipe.prompts.format == "text" and "59 prompts in `prompt`, 1 more are dup" in text
    assert recipe.prompts.test == 0.4  # of 59 prompts no share gives a hundred
    # 64 positions hold the prompt's three tokens, <s> and the answer
    assert recipe.sampling.max_new_tokens <= 64 - 4
    assert [c.name for c in recipe.objective.constraints] == ["brief"]
    assert recipe.problem.reward == "many" and recipe.objective.constraints[0].margins_in_std
    assert repeated(Recipe, parse_yaml(text)) == []
    assert unexplained(text, {"name", "type", "target"}) == []
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.slow
def test_scores_and_numbers_are_those_of_the_models_answers(here):
    """A margin and β by what `cdpo check` measures on its own samples, within sampling noise."""
    cdpo("new", "mine.yaml", *GIVEN, "--constraint", "scorers.py:brief", check=0)
    overrides = ("-s", "dual.prompts_per_round=32", "-s", "fit.steps=2")
    checked = json.loads(cdpo("check", "mine.yaml", *overrides, "--json", check=0).stdout)
    scores = checked["pilot"]["scores"]
    text = (here / "mine.yaml").read_text()
    std = float(re.search(r"std within a prompt, ([\d.]+)", text)[1])
    assert std == pytest.approx(scores["many"]["std_within"], rel=0.5)
    assert load_recipe(here / "mine.yaml").objective.beta == pytest.approx(std / 4, rel=0.2)


def test_a_chat_model_a_classifier_and_a_given_margin(here):
    options = ("--policy", "chatty", "--prompts", "prompts.csv", "--reward", "good=judge")
    more = ("--constraint", "few=scorers.py:brief", "--margin", "few=0.25")
    output = cdpo("new", "mine.yaml", *options, *more, check=0).stdout
    recipe = load_recipe(here / "mine.yaml")
    assert recipe.prompts.format == "chat" and recipe.scorers["good"].type == "classifier"
    assert recipe.problem.constraints[0].margin == 0.25
    assert "next: cdpo check mine.yaml" in output and "32 answers" in output


def test_a_block_as_in_a_recipe_and_another_folder(here):
    (here / "recipes").mkdir()
    block = '{type: python, target: "scorers.py:brief", range: [-7, 0]}'
    cdpo("new", "recipes/mine.yaml", *GIVEN, "--constraint", f"few={block}", check=0)
    recipe = load_recipe(here / "recipes/mine.yaml")
    assert recipe.score_ranges["few"] == (-7, 0)
    assert recipe.scorers["few"].place == f"{here}/scorers.py:brief"


def test_a_scorer_that_tells_nothing_apart_is_a_warning(here):
    output = cdpo("new", "mine.yaml", *GIVEN, "--constraint", "scorers.py:same", check=0).stdout
    assert "warning: scorer of same: gives 1 to all 32 answers" in output


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"--policy": None}, "give --policy too"),
        ({"--policy": "judge"}, "LlamaForSequenceClassification, which does not write"),
        ({"--policy": "nowhere/at-all"}, "needs a download"),
        ({"--policy": "prompts.csv"}, "is a file"),
        ({"--prompts": "absent.csv"}, "no such file"),
        ({"--prompts": "asked.csv"}, "rename question to prompt"),
        ({"--prompts": "empty.jsonl"}, "is empty"),
        ({"--prompts": "few.txt"}, "has 2 prompts"),
        ({"--prompts": "long.txt"}, "no room for an answer"),
        ({"--prompts": "chats.jsonl"}, "no chat template"),
        ({"--reward": "scorers.py:none"}, "has no function none"),
        ({"--reward": "scorers.py:broken"}, "no table"),
        ({"--reward": "labels"}, "3 labels (LABEL_0, LABEL_1, LABEL_2)"),
        ({"--reward": "http://localhost:1/score"}, "version: WORDS"),
        ({"--reward": "{type: pyton}"}, "--reward"),
        ({"--constraint": "judge"}, "write NAME=SPEC"),
        ({"--constraint": "scorers.py:many"}, "many is taken"),
        ({"--margin": "short=1"}, "NAME a constraint (brief)"),
        ({"--margin": "brief=much"}, "objective.constraints.0.margin: it is 'much'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(here, refused, changes, match):
    (here / "asked.csv").write_text("id,question\n1,w1\n")
    (here / "empty.jsonl").write_text("")
    (here / "few.txt").write_text("w1\nw2\n")
    (here / "long.txt").write_text("".join(f"w{i} " * 60 + "\n" for i in range(9)))
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    chat.append({"role": "user", "content": "w3"})
    (here / "chats.jsonl").write_text(json.dumps({"prompt": chat}) + "\n")
    options = dict(zip(GIVEN[::2], GIVEN[1::2], strict=True)) | {"--constraint": "scorers.py:brief"}
    options = {k: v for k, v in (options | changes).items() if v is not None}
    refused("new", "mine.yaml", *(w for pair in options.items() for w in pair), match=match)
    assert not (here / "mine.yaml").exists()


def test_a_recipe_is_never_overwritten(here, refused):
    (here / "mine.yaml").write_text("name: kept\n")
    refused("new", "mine.yaml", *GIVEN, match="is there already")
    refused("new", "mine", *GIVEN, match="name it mine.yaml")
    assert (here / "mine.yaml").read_text() == "name: kept\n"


def test_a_recipe_that_ships_is_copied(tmp_path, refused):
    cdpo("new", tmp_path / "mine.yaml", "--copy", "quickstart", check=0)
    assert (tmp_path / "mine.yaml").read_text() == (RECIPES / "quickstart.yaml").read_text()
    refused("new", tmp_path / "b.yaml", "--copy", "quick", match="there are caid_hh_two")
    words = "--copy", "quickstart", "--policy", "x"
    refused("new", tmp_path / "b.yaml", *words, match="drop --policy, or --copy")


def test_a_terminal_is_asked_for_what_is_missing(here, monkeypatch):
    leader, follower = open_terminal()
    answers = ["scorers.py", "scorers.py:many", "scorers.py:brief", "0.2", ""]
    os.write(leader, "".join(f"{answer}\n" for answer in answers).encode())
    with open(follower) as tty:
        monkeypatch.setattr("sys.stdin", tty)
        errors = cdpo("new", "mine.yaml", *GIVEN[:4], check=0).stderr
    os.close(leader)
    assert "error: reward scorers.py" in errors  # asked again
    problem = load_recipe(here / "mine.yaml").problem
    assert problem.reward == "many" and problem.constraints[0].margin == 0.2


@pytest.mark.parametrize("count", [5, 40, 100, 250, 499, 500, 3000, 5001, 100_000])
def test_the_test_share_gives_enough_prompts_and_leaves_more(count):
    share, why = share_of(count)
    assert 0 < share <= 0.4 and (why == "") == (share == 0.2)
    if count >= 250:
        assert 95 <= share * count <= 1050


@pytest.mark.parametrize(
    "value",
    [
        *("a", "0.5std", "a b", "a: b", "#x", "true", "1e3", "[x]", "ü", "a'b\"c", "~", "a.py:f"),
        *(True, 3, 0.25, [0.0, 1.0], {"k": "v: w", "n": [1, "x,y"]}),
    ],
)
def test_a_value_is_read_back_as_it_was(value):
    assert parse_yaml(shown(value)) == value
    assert parse_yaml(f"key: {shown({'k': value})}") == {"key": {"k": value}}


@pytest.mark.slow
def test_a_round_of_a_written_recipe_is_played(here):
    cdpo("new", "mine.yaml", *GIVEN, "--constraint", "scorers.py:brief", check=0)
    small = "sampling.responses_per_prompt=8", "dual.responses_per_prompt=16", "fit.steps=12"
    options = [word for key in (*small, "fit.refresh=1", "dual.trials=2") for word in ("-s", key)]
    cdpo("check", "mine.yaml", *options, check=0)
    cdpo("init", "mine.yaml", "runs/mine", *options, check=0)
    record = json.loads(cdpo("round", "runs/mine", "--json", check=0).stdout)
    assert record["round"] == 0 and record["test"]["verdicts"].keys() == {"brief"}
