"""Numbers that a recipe leaves open."""

import pytest

from constrained_dpo.recipe.defaults import choices, sized
from constrained_dpo.recipe.schema import Recipe

CONTENT = {
    "name": "plain",
    "policy": {"model": "some-folder"},
    "prompts": {"source": {"dataset": "some-file.jsonl"}},
    "objective": {
        "beta": 0.25,
        "reward": {"name": "helpful", "scorer": {"type": "python", "target": "scores:helpful"}},
        "constraints": [
            {
                "name": "harmless",
                "margin": 0.5,
                "scorer": {"type": "python", "target": "scores:harmless"},
            }
        ],
    },
}
PROMPTS = {"fit": 1000, "dual": 200, "test": 100}


def _recipe(**blocks: dict) -> Recipe:
    return Recipe.model_validate(CONTENT | blocks)


def test_open_numbers_follow_from_the_number_of_prompts():
    recipe = sized(_recipe(), PROMPTS)
    rows = recipe.fit.batch_size * recipe.fit.gradient_accumulation
    assert recipe.dual.responses_per_prompt == 60  # 12,000 on 200 dual prompts
    assert recipe.sampling.responses_per_prompt == 8  # 3,000 make 2.5: a group
    assert recipe.fit.steps * rows >= 1200  # each prompt once
    assert recipe.fit.groups_per_prompt * 1200 >= recipe.fit.steps * rows
    few = sized(_recipe(), {"fit": 10, "dual": 10, "test": 10})
    assert few.dual.responses_per_prompt == 256
    assert few.sampling.responses_per_prompt == 64


@pytest.mark.parametrize(("method", "times"), [("solve", 2), ("subgradient", 1), ("one_shot", 1)])
def test_the_level_of_all_trials_gets_twice_the_samples(method, times):
    recipe = sized(_recipe(dual={"method": method, "responses_per_prompt": 7}), PROMPTS)
    assert recipe.dual.reference_responses == 7 * times


def test_written_numbers_stay():
    dual = {"responses_per_prompt": 9, "reference_responses": 5}
    fit = {"steps": 11, "groups_per_prompt": 3, "warmup_steps": 2}
    recipe = sized(_recipe(dual=dual, fit=fit, sampling={"responses_per_prompt": 12}), PROMPTS)
    assert {name: getattr(recipe.dual, name) for name in dual} == dual
    assert {name: getattr(recipe.fit, name) for name in fit} == fit
    assert recipe.sampling.responses_per_prompt == 12


def test_a_sized_recipe_stays_as_it_is():
    recipe = sized(_recipe(), PROMPTS)
    assert sized(recipe, {"fit": 7, "dual": 3, "test": 2}) == recipe


def test_words_name_only_what_was_open():
    open_ = _recipe()
    lines = "\n".join(choices(sized(open_, PROMPTS), open_, "logistic"))
    assert "60 responses per dual or test prompt" in lines
    assert "120 responses of π_ref per dual or test prompt" in lines
    written = _recipe(dual={"responses_per_prompt": 9, "reference_responses": 9})
    lines = "\n".join(choices(sized(written, PROMPTS), written, None))
    assert "per dual or test prompt" not in lines
