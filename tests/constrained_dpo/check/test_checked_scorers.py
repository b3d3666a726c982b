"""What check and prepare know of a scorer: its scores' statistics, drift by quantization, Beaver's
published value."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.check.scorers import checked_scorer, golden_lines
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.report.scorer_words import describe_drift, prepared_lines
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.scorer_facts import score_statistics, scorer_facts
from data_prep.files import write_json
from data_prep.scorers.beaver import GOLDEN_TEXT
from data_prep.scorers.calibration import DRIFT_ANSWERS, DRIFT_PROMPTS
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.scoring import make_scorer
from tests.helpers.beaver import plain_score, save_beaver
from tests.helpers.models import save_classifier
from tests.helpers.paths import QUICKSTART


def with_reward_scorer(block: str):
    return load_recipe(QUICKSTART, [f"objective.reward.scorer={block}"])


def test_statistics_count_what_a_clip_cut():
    table = pd.DataFrame(
        {"prompt_id": ["p", "q", "p", "q"], "r": [0.0, 1.0, 2.0, 3.0], "g": [0.0, 1.0, 1.0, 0.25]}
    )
    options = {"r": ScorerOptions(), "g": ScorerOptions(clip=[0, 1])}
    statistics = score_statistics(table, options)
    assert statistics["r"]["mean"] == 1.5 and statistics["r"]["q25"] == 0.75
    assert statistics["r"]["std"] == pytest.approx(np.sqrt(1.25))
    assert statistics["r"]["std_within"] == pytest.approx(np.sqrt(4 * 1.0 / 2))  # two freedoms
    assert statistics["g"]["clipped"] == 0.75 and "clipped" not in statistics["r"]


def test_drift_is_in_what_check_and_prepare_know_of_a_scorer(tmp_path):
    save_classifier(tmp_path / "model", " ".join([*DRIFT_PROMPTS, *DRIFT_ANSWERS]))
    recipe = with_reward_scorer(
        f"{{type: classifier, model: {tmp_path / 'model'}, quantization: nf4}}"
    )
    learner, run = LoraLearner(recipe, pd.DataFrame()), RunDirectory(tmp_path)
    measured = learner.measured_scorers(pd.DataFrame())
    assert measured.keys() == {"helpful"} and measured["helpful"].keys() == {"quantization_drift"}
    drift = measured["helpful"]["quantization_drift"]
    assert drift["mean"] > 0
    checked = checked_scorer(
        "helpful", learner.scorers["helpful"], recipe.scorers["helpful"], recipe
    )
    assert checked.quantization_drift == drift
    pool = pd.DataFrame({"prompt_id": ["p", "p"], "helpful": [0.0, 1.0], "harmless": [1.0, 2.0]})
    facts = scorer_facts(recipe, pool, measured)
    write_json(run.scorers_file, {name: fact.to_json() for name, fact in facts.items()})
    lines = prepared_lines(run, recipe)
    assert len(lines) == 3 and lines[0].startswith("scores of helpful: mean 0.5, std 0.5")
    assert lines[2] == describe_drift("helpful", drift)


def test_a_drift_is_said_in_std_or_why_there_is_none():
    drift = {"quantization": "nf4", "against": "float32", "texts": 24, "std": 2.0}
    words = describe_drift("g", drift | {"mean": 0.031, "largest": 0.12})
    assert "scores move by 0.031 std on average, 0.12 std at most" in words
    assert "do not differ" in describe_drift("g", drift | {"mean": None, "largest": None})
    assert "not measured (no weights)" in describe_drift("g", drift | {"reason": "no weights"})


def test_the_golden_value_is_computed_where_the_model_is_and_else_said_how(tmp_path):
    folder = tmp_path / "beaver-7b-v1.0-reward"
    tensors = save_beaver(folder)
    recipe = with_reward_scorer(f"{{type: beaver, model: {folder}, dtype: float32}}")
    scorer = make_scorer(recipe.scorers["helpful"])
    prompt, response = GOLDEN_TEXT
    text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
    expected = plain_score(tensors, scorer.tokenizer(text)["input_ids"])
    assert scorer.golden_score() == pytest.approx(expected, abs=1e-5)
    (line,) = golden_lines(recipe, {"helpful": scorer})
    assert f"scores {expected:.4f}, published -11.3254" in line and "DIFFERS" in line
    (line,) = golden_lines(recipe, {})
    assert "cdpo data score golden.jsonl" in line and "append_eos: false" in line
    assert golden_lines(load_recipe(QUICKSTART), {}) == []
