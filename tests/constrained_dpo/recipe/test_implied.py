"""What one key of a recipe implies for another."""

import pytest

from constrained_dpo.recipe.implied import with_implied
from constrained_dpo.recipe.load import load_recipe
from tests.helpers.paths import QUICKSTART

EMBEDDED = {"learning_rate": 5e-4, "loraplus_ratio": 16.0}


def rates(text: str, tmp_path, *overrides: str) -> tuple[float, float]:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    fit = load_recipe(file, overrides).fit
    return fit.learning_rate, fit.loraplus_ratio


def test_a_language_model_has_other_rates_than_the_embedded_world(tmp_path):
    lines = QUICKSTART.read_text().splitlines()
    text = "\n".join(line for line in lines if not line.strip().startswith(("learning_r", "lorap")))
    chat = text.replace("model: quickstart", "model: ./chat")
    assert chat != text
    assert rates(text, tmp_path) == (5e-4, 16)
    assert rates(chat, tmp_path) == (5e-5, 4)
    assert rates(text, tmp_path, "fit.learning_rate=1e-3") == (1e-3, 16)
    assert rates(chat, tmp_path, "fit.loraplus_ratio=1") == (5e-5, 1)


@pytest.mark.parametrize(
    ("content", "fit"),
    [
        ({"policy": {"model": "quickstart"}}, EMBEDDED),
        ({"policy": {"model": "quickstart"}, "fit": {"loraplus_ratio": 2}},
         EMBEDDED | {"loraplus_ratio": 2}),
        ({"dual": {"method": "fixed"}}, {"conditional": None}),
        ({"dual": {"method": "fixed"}, "fit": {"conditional": {}}}, {"conditional": {}}),
        ({"objective": {"constraints": []}, "sampling": {"responses_per_prompt": 3}},
         {"conditional": None, "group_size": 3}),
        ({"sampling": {"responses_per_prompt": 3}, "fit": {"group_size": 2}}, {"group_size": 2}),
        ({"policy": {"model": "./chat"}}, {}),
    ],
)  # fmt: skip
def test_what_is_said_is_kept_and_the_rest_filled_in(content, fit):
    assert with_implied(content).get("fit", {}) == fit


@pytest.mark.parametrize("content", [None, [], "a", {"fit": 3}, {"policy": ["quickstart"]}])
def test_what_is_no_recipe_is_left_to_the_schema(content):
    assert with_implied(content) == content
