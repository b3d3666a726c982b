"""What a run is expected to take, from what a pilot measured."""

import pandas as pd
import pytest
import yaml

from constrained_dpo.check.expected_time import Timing, expected_seconds
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from tests.helpers.paths import QUICKSTART

TIMING = Timing(reference_response=0.0, response=0.0, step=3.0, around_fit=0.0)


def seconds(**changes) -> dict[str, float]:
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["fit"] |= {"batch_size": 4, "gradient_accumulation": 1, "group_size": 4}
    raw["fit"] |= {"steps": 100, "refresh": 2, "conditional": {"distill_steps": 30}}
    raw["dual"] |= {"method": "solve", "rounds": 3, "trials": 5}
    raw["objective"]["constraints"][0] |= changes
    learner = LoraLearner(Recipe.model_validate(raw), pd.DataFrame())
    return expected_seconds(learner, {"fit": 8, "dual": 8, "test": 4}, TIMING, 0)


def test_members_by_category_cost_their_distillations():
    plain, by_kind = seconds(), seconds(by="kind", min_prompts=2)
    assert plain["fit"] == by_kind["fit"] == 300.0 and plain["rescore"] == 0.0
    # five trials, the sample between two stretches and the round's adapter; a step has 32 sequences
    # where the fit's has 16, and a third more for the teacher
    assert by_kind["rescore"] == pytest.approx(7 * 30 * 3.0 * 2 * 4 / 3)
    assert by_kind["run"] == pytest.approx(plain["run"] + 3 * by_kind["rescore"])
