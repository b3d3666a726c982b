"""What a recipe's numbers can never carry is said before the run; a pilot takes a minute."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.check.limits import certificate_limits, reachable_verdicts, verdict_limits
from constrained_dpo.check.pilot_size import SECONDS, pilot_size, responses_per_prompt
from constrained_dpo.check.precision import expected_precision
from constrained_dpo.estimates.certificate import certify
from constrained_dpo.estimates.slack import estimate_subgradient
from constrained_dpo.estimates.verdict import SATISFIED, overall
from constrained_dpo.recipe.load import load_recipe
from tests.helpers.paths import QUICKSTART

RANGE = "objective.constraints.harmless.scorer.range=[0,1]"


def recipe_with(*overrides: str):
    return load_recipe(QUICKSTART, ["policy.quantization=none", *overrides])


@pytest.mark.parametrize("drawn", [2, 4, 5])
def test_four_responses_are_said_to_carry_no_certificate_and_carry_none(drawn):
    """The best case there is: a policy whose weights vary by a thousandth of a nat."""
    recipe = recipe_with(f"dual.responses_per_prompt={drawn}")
    lines = certificate_limits(recipe)
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{i}" for i in range(50)], drawn),
            "source": "round-0",
            "helpful": 2.5e-4 * rng.normal(size=50 * drawn),
            "harmless": 0.0,
            **dict.fromkeys(("policy_logp", "ref_logp", "sample_logp"), -3.0),
            "path_kl": 0.0,
        }
    )
    lambda_ = pd.Series({"harmless": 0.5})
    certificate = certify(table, table, {}, None, recipe.problem, lambda_)
    assert (certificate.dual_value is None) == bool(lines) == (drawn <= 4)
    assert all(f"dual.responses_per_prompt {drawn} " in line for line in lines)


@pytest.mark.parametrize("prompts", [2, 12, 40])
def test_too_few_test_prompts_for_any_verdict_are_named(prompts):
    """A score in [0, 1] that must rise by 0.5: with the highest slack everywhere the verdict is
    satisfied exactly where nothing is said."""
    recipe = recipe_with(RANGE)
    problem = recipe.problem
    lines = verdict_limits(recipe, problem, pd.DataFrame({"split": ["test"] * prompts}))
    one = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(prompts)], "helpful": 0.0})
    rounds = recipe.dual.rounds
    assert rounds > 1
    u = estimate_subgradient(
        one.assign(harmless=1.0),
        one.assign(harmless=0.0),
        problem,
        bounds={"harmless": (-1.5, 0.5)},
        verdict_confidence=0.975,
    )
    assert (overall(u) == SATISFIED) == (not lines)
    assert bool(lines) == (prompts < 40)


def test_without_a_range_no_number_of_prompts_is_refused():
    recipe = recipe_with()
    assert verdict_limits(recipe, recipe.problem, pd.DataFrame({"split": ["test"] * 2})) == []


def test_a_level_that_noise_hides_is_named_by_the_pilots_samples():
    """The best of four responses lies 0.1 above the level; twelve prompts decide about more."""
    recipe = recipe_with("dual.responses_per_prompt=4")
    problem = recipe.problem
    pool = pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{i}" for i in range(12)], 4),
            "harmless": np.tile([0.6, -0.2, -0.2, -0.2], 12),
        }
    )
    expect = lambda tested: expected_precision(
        pool,
        problem,
        responses_per_prompt=4,
        prompts=pd.DataFrame({"dual": {"harmless": 12}, "test": {"harmless": tested}}),
        target_se={},
    )
    (line,) = reachable_verdicts(recipe, problem, pool, expect(12))
    assert line.startswith("verdict on harmless") and "reach 0.1;" in line
    assert reachable_verdicts(recipe, problem, pool, expect(4000)) == []


@pytest.mark.parametrize("seconds", [1e-4, 0.1, 1.0])
def test_a_pilot_takes_a_minute_on_a_slow_model_and_all_of_it_on_a_fast_one(seconds):
    recipe = recipe_with("sampling.batch_size=512")
    size = pilot_size(recipe, 48, seconds)
    per_prompt = responses_per_prompt(recipe)
    cost = seconds * per_prompt * (size.prompts + 2 * size.adapter_prompts)
    assert size.bounded == (seconds > 0.01) and (size.prompts == 48) == (seconds < 0.01)
    # the fewest prompts that say anything may take longer than their third
    assert cost <= max(SECONDS * 2 / 3, seconds * per_prompt * (4 + 2))
