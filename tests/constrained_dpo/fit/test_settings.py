"""The settings of a fit: how long each round's is, and what means nothing."""

import pytest

from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from tests.helpers.paths import QUICKSTART


def fit_of(*overrides: str):
    return load_recipe(QUICKSTART, list(overrides)).fit


@pytest.mark.parametrize(
    ("share", "steps"),
    [
        (None, [9, 9, 9, 9]),
        ("fit.later_rounds=0.5", [9, 4, 4, 4]),
        ("fit.later_rounds=[0.5, 0.01]", [9, 4, 1, 1]),
    ],
)
def test_later_rounds_get_their_share_of_steps(share, steps):
    shares = [share] if share else []
    fit = fit_of(*shares, "fit.steps=9", "fit.warmup_steps=0")
    assert [fit.in_round(t).steps for t in range(4)] == steps


def test_the_warm_up_gets_its_share_and_is_shorter_than_the_fit():
    fit = fit_of("fit.later_rounds=[0.5, 0.005]")  # 200 steps, 10 of warm-up
    assert [fit.in_round(t).warmup_steps for t in range(3)] == [10, 5, 0]
    assert fit.in_round(2).steps == 1


def test_a_rate_falls_from_round_to_round():
    fit = fit_of("fit.rate_schedule=inverse_sqrt", "fit.learning_rate=6e-4")
    rates = [fit.in_round(number).learning_rate for number in (0, 3, 8)]
    assert rates == pytest.approx([6e-4, 3e-4, 2e-4])
    assert fit_of("fit.learning_rate=6e-4").in_round(8).learning_rate == 6e-4


def test_later_rounds_get_their_share_of_epochs():
    fit = fit_of("fit.steps=null", "fit.epochs=3", "fit.later_rounds=[1, 0.5]")
    assert [fit.in_round(t).epochs for t in range(4)] == [3, 3, 1.5, 1.5]
    assert fit.in_round(3).steps is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.later_rounds=0", "greater than 0"),
        ("fit.later_rounds=50", "less than or equal to 1"),
        ("fit.later_rounds=[]", "later_rounds is an empty list"),
        ("fit.early_stop=3", "there are none; set fit.holdout"),
        ("fit.eval_steps=7", "there are none; set fit.holdout"),
        ("fit.holdout=1", "less than 1"),
        ("fit.save_steps=0", "greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        fit_of(override)


def test_a_default_that_is_named_gives_the_same_recipe():
    plain = load_recipe(QUICKSTART).hash()
    defaults = ["fit.later_rounds=1.0", "fit.holdout=0", "fit.save_steps=null"]
    assert plain == load_recipe(QUICKSTART, defaults).hash()
    assert plain != load_recipe(QUICKSTART, ["fit.later_rounds=0.5"]).hash()
