"""log Z from samples: the textbook jackknife, and an estimate that is biased high."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.estimates.log_partition import log_mean_exp, upper_log_mean


def test_jackknife_is_the_textbook_one_and_less_biased():
    rng = np.random.default_rng(0)
    values = pd.Series(rng.normal(size=15))
    ours = log_mean_exp(values, pd.Series(["a"] * 7 + ["b"] * 8))
    for name, part in (("a", values[:7]), ("b", values[7:])):
        plain = np.log(np.mean(np.exp(part)))
        left_out = [np.log(np.mean(np.exp(part.drop(i)))) for i in part.index]
        assert ours.loc[name, "plain"] == pytest.approx(plain)
        assert ours.loc[name, "jackknife"] == pytest.approx(
            len(part) * plain - (len(part) - 1) * np.mean(left_out)
        )
        assert ours.loc[name, "ess"] == pytest.approx(
            np.exp(part).sum() ** 2 / (np.exp(part) ** 2).sum()
        )
    many = log_mean_exp(
        pd.Series(rng.normal(size=200_000)), pd.Series(np.repeat(np.arange(20_000), 10))
    )
    assert (
        abs(many["jackknife"].mean() - 0.5) < 0.3 * abs(many["plain"].mean() - 0.5)
        and many["plain"].mean() < 0.5
    )


def test_weights_of_a_single_response_do_not_break_the_jackknife():
    value = log_mean_exp(pd.Series([0.0, -2000.0, -2000.0, 5.0]), pd.Series(["a", "a", "a", "b"]))
    assert np.isfinite(value.to_numpy()).all() and value.loc["b", "jackknife"] == 5.0


def repeated(draws: np.ndarray) -> tuple[pd.Series, pd.Series]:
    """Exponents (num_prompts, K) as columns: values and prompts."""
    count, size = draws.shape
    return pd.Series(draws.ravel()), pd.Series(np.repeat(np.arange(count), size))


LAWS = {
    "normal": lambda rng, shape: (rng.normal(0, 1.5, shape), 1.5**2 / 2),
    "two heaps": lambda rng, shape: (
        np.where(rng.random(shape) < 0.2, 3.0, 0.0),
        np.log(0.8 + 0.2 * np.exp(3.0)),
    ),
    "a rare peak": lambda rng, shape: (
        np.where(rng.random(shape) < 0.02, 4.0, 0.0),
        np.log(0.98 + 0.02 * np.exp(4.0)),
    ),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("count", [4, 16])
def test_the_truth_lies_between_the_two_in_expectation(law, count):
    draws, exact = LAWS[law](np.random.default_rng(count), (20_000, count))
    values, prompts = repeated(draws)
    upper = upper_log_mean(values, prompts, pd.Series("one", index=values.index))
    lower = log_mean_exp(values, prompts)["plain"]
    assert lower.mean() - 3 * lower.sem() <= exact <= upper.mean() + 3 * upper.sem()
    assert lower.mean() < exact - 0.01


def test_the_upper_one_closes_in_with_more_responses():
    rng, gaps = np.random.default_rng(0), []
    for count in (8, 32, 128):
        values, prompts = repeated(rng.normal(size=(2000, count)))
        upper = upper_log_mean(values, prompts, pd.Series("one", index=values.index))
        gaps.append(upper.mean() - 0.5)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_each_fold_has_the_same_share_of_every_law():
    """Draws of two laws with means that differ by 5 nats: folds of unequal shares would be far
    apart."""
    rng = np.random.default_rng(0)
    values = pd.Series(np.r_[rng.normal(5, 0.1, 6), rng.normal(0, 0.1, 10)])
    strata = pd.Series(["a"] * 6 + ["b"] * 10)
    upper = upper_log_mean(values, pd.Series("p", index=values.index), strata)
    kept = np.r_[values[:4], values[6:14]]  # as many as four folds divide
    assert upper["p"] == pytest.approx(np.log(np.exp(kept).mean()), abs=0.02)


def test_one_response_of_a_law_has_no_upper_value():
    values, prompts = repeated(np.zeros((3, 4)))
    strata = pd.Series(["a", "a", "a", "b"] * 3)
    assert np.isinf(upper_log_mean(values, prompts, strata)).all()
