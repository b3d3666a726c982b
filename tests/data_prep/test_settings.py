"""A truth value is no number, index or label, wherever a recipe or an option is read."""

import pytest
from pydantic import ValidationError

from constrained_dpo.evaluation.judge_answers import JudgeSettings
from constrained_dpo.gate.settings import GateSettings
from constrained_dpo.recipe.load import load_recipe, schema_blocks
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.settings import parse_scorer

TRUTH = {
    "a label's index": "objective.reward.scorer={type: classifier, model: m, label: true}",
    "a label's name": "objective.reward.scorer={type: classifier, model: m, label: false}",
    "β": "objective.beta=true",
    "a word for β": "objective.beta=True",
    "a margin": "objective.constraints.0.margin=true",
    "a threshold": "objective.constraints.0.threshold=true",
    "a number in a list": "objective.reward.scorer.clip=[false, true]",
    "a number in a mapping": "dual.init={harmless: true}",
    "steps": "fit.steps=true",
    "a fraction": "prompts.test=true",
    "a class of a server": "objective.reward.scorer={type: http, url: 'http://x', version: a, "
    "label: true}",
    "a guard's words": "objective.reward.scorer={type: guard, model: m, safe: [yes, true]}",
    "a pair of numbers": "fit.conditional.kappa=[true, 2]",
    "the seed": "seed=false",
}


@pytest.mark.parametrize("kind", TRUTH)
def test_a_truth_value_is_refused_by_its_key(kind):
    option = TRUTH[kind]
    with pytest.raises(UserError) as error:
        load_recipe(RECIPE, [option])
    key = option.split("=")[0]
    lines = [line for line in str(error.value).splitlines() if key in line]
    assert lines and "truth value" in lines[0]


RECIPE = {
    "name": "r",
    "policy": {"model": "quickstart", "quantization": "none"},
    "prompts": {"source": {"dataset": "quickstart"}, "test": 0.2},
    "objective": {
        "beta": 1,
        "reward": {"name": "long", "scorer": {"type": "python", "target": "s.py:f"}},
        "constraints": [
            {"name": "brief", "margin": 1, "scorer": {"type": "python", "target": "s.py:g"}}
        ],
    },
}


def test_no_field_of_any_block_takes_a_truth_value_for_something_else():
    blocks = (block for model in (Recipe, GateSettings) for block in schema_blocks(model).values())
    for block in [*blocks, JudgeSettings]:
        for name, field in block.model_fields.items():
            if "bool" in str(field.annotation):
                continue
            with pytest.raises(ValidationError) as error:
                block.model_validate({name: True})
            assert any(name in item["loc"] or not item["loc"] for item in error.value.errors())


def test_words_stay_words_and_truth_values_stay_where_they_belong():
    for word in ("yes", "no", "on", "off", "'true'"):
        scorer = parse_scorer(f"{{type: classifier, model: m, label: {word}}}", "--scorer")
        assert scorer.label == word.strip("'")
    settings = {"type": "classifier", "model": "m", "label": 1, "truncate": True, "negate": True}
    assert ClassifierScorerSettings.model_validate(settings).label == 1


def test_an_option_says_it_in_a_line():
    with pytest.raises(UserError, match=r"--scorer: classifier\.label holds a truth value") as e:
        parse_scorer("{type: classifier, model: m, label: true}", "--scorer")
    assert len(str(e.value).splitlines()) == 1
