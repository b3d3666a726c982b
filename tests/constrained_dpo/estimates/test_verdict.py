"""Verdicts, and the bounds they rest on against their definition."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from constrained_dpo.estimates.intervals import confidence_bound
from constrained_dpo.estimates.verdict import judge, one_sided_bounds


def bounds_frame(u: float, se: float, skew: float, count: int, m: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        {"u": u, "se": se, "skew": skew, "num_prompts": count}, index=[f"g{i}" for i in range(m)]
    )


@pytest.mark.parametrize("skew", [-2.0, -0.5, 0.0, 1.5])
def test_confidence_bound_inverts_halls_transformation(skew):
    n, se, u, p = 30, 0.2, 1.0, 0.05
    bound = confidence_bound(bounds_frame(u, se, skew, n), p)["g0"]
    quantile = stats.t.ppf(1 - p, n - 1)
    transformed = lambda w: (
        np.sqrt(n) * (w + skew / 3 * w**2 + skew**2 / 27 * w**3 + skew / (6 * n)) - quantile
    )
    w = optimize.brentq(transformed, -50, 50)
    assert bound == pytest.approx(u - w * se * np.sqrt(n))
    if skew == 0:
        assert bound == pytest.approx(u - quantile * se)


def test_a_long_lower_tail_does_not_make_satisfied_cheap():
    """A tenth of the prompts is where the policy fails: the true mean is 0, so *satisfied* is false
    every time it is said."""
    rng = np.random.default_rng(0)
    draws = pd.DataFrame(
        np.where(rng.random((40, 2000)) < 0.1, -9.0, 1.0) + 0.5 * rng.normal(size=(40, 2000))
    )
    frame = pd.DataFrame(
        {"u": draws.mean(), "se": draws.sem(), "skew": draws.skew(), "num_prompts": 40}
    ).rename(index=str)
    plain, ours = ((confidence_bound(f, 0.05) > 0).mean() for f in (frame.assign(skew=0.0), frame))
    # `judge` says satisfied of a single constraint where this lower bound is above 0.
    satisfied = confidence_bound(frame, 0.05)["0"] > 0
    assert judge(frame.iloc[[0]], 0.95)["0"] == ("satisfied" if satisfied else "undecided")
    assert plain > 0.08 and ours < plain - 0.01 and ours < 0.05


def test_bounds_without_spread_or_with_one_prompt():
    certain = one_sided_bounds(bounds_frame(0.0, 0.0, 0.0, 50), 0.95)
    assert certain.loc["g0"].tolist() == [0.0, 0.0]
    unknown = one_sided_bounds(bounds_frame(3.0, np.inf, 0.0, 1), 0.95)
    assert unknown.loc["g0"].tolist() == [-np.inf, np.inf]


def test_verdicts_are_one_sided_with_bonferroni():
    frame = lambda us, se: pd.DataFrame(
        {"u": us, "se": se, "skew": 0.0, "num_prompts": 10_000},
        index=[f"g{i}" for i in range(len(us))],
    )
    assert judge(frame([1.7], 1.0), 0.95)["g0"] == "satisfied"  # one-sided 5 %: 1.645
    # over two constraints: 1.960
    assert judge(frame([1.7, 1.7], 1.0), 0.95)["g0"] == "undecided"
    assert judge(frame([-1.7], 1.0), 0.95)["g0"] == "violated"
    assert judge(frame([0.0], 1.0), 0.95)["g0"] == "undecided"
