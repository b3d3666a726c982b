"""The law of label rows' multipliers, and the floor of a range."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp, kstest

from data_prep.errors import UserError
from data_prep.labels.multipliers import KAPPA, MultiplierRange, multiplier_floor
from tests.helpers.multipliers import DRAWN, RANGE, frame_of, range_of

KEYS = np.random.default_rng(0).integers(0, 2**64, size=(2, 20_000), dtype=np.uint64)


@pytest.mark.parametrize(
    ("center", "floor", "factor"),
    [(0.4, 0.05, 3.0), (0.0, 0.05, 3.0), (0.1, 0.05, 5.0), (2.0, 1e-6, 1.5), (0.01, 0.05, 3.0)],
)
def test_multipliers_gather_at_their_center_and_reach_0_below_the_floor(center, floor, factor):
    law = range_of(g=(center, floor), factor=factor)
    drawn = law.draw(7, *KEYS)["lambda/g"]
    middle = max(center, floor)
    bottom, low = middle / factor, float(law.low["g"])
    assert low == (0.0 if bottom <= floor else bottom)
    assert law.high["g"] == middle * factor
    assert drawn.between(low, law.high["g"]).all()
    x = np.random.default_rng(0).uniform(-1, 1, 200_000) ** 3
    if center < floor:
        defined = np.where(x < 0, center * (1 + x), center + (floor * factor - center) * x)
    else:
        defined = center * factor**x
        if low == 0:
            stretched = np.interp(defined, [bottom, floor], [0, floor])
            defined = np.where(defined <= floor, stretched, defined)
    assert ks_2samp(drawn, defined).pvalue > 1e-3
    if low == 0:
        assert drawn.min() < 0.01 * floor
    if center >= floor:
        near = drawn.between(center / factor**0.125, center * factor**0.125)
        assert near.mean() == pytest.approx(0.5, abs=0.03)


def test_kappa_is_log_uniform_and_draws_of_columns_are_independent():
    drawn = RANGE.draw(3, *KEYS)
    assert list(drawn) == DRAWN and drawn.dtypes.eq(float).all()
    assert drawn[KAPPA].between(0.5, 1.5).all()
    assert kstest(np.log(drawn[KAPPA] / 0.5) / np.log(3), "uniform").pvalue > 1e-3
    assert np.abs(drawn.corr(method="spearman").to_numpy() - np.eye(3)).max() < 0.03


def test_a_row_s_draw_depends_on_seed_column_and_its_keys_alone():
    drawn = RANGE.draw(3, *KEYS)
    part = RANGE.draw(3, *KEYS[:, 5:9])
    pd.testing.assert_frame_equal(part, drawn.iloc[5:9].reset_index(drop=True))
    alone = range_of(g=(0.4, 0.05)).draw(3, *KEYS)
    pd.testing.assert_frame_equal(alone, drawn[["lambda/g"]])
    again = RANGE.draw(4, *KEYS) == drawn
    assert again.mean().max() < 0.3  # h, around 0, is 0 in half of the rows
    assert not again[[DRAWN[0], KAPPA]].any(axis=None)


def test_the_floor_is_a_tenth_of_the_pooled_scales_within_prompts():
    frame = frame_of().sample(frac=0.7, random_state=2)
    frame["g"] += 100.0 * frame["prompt_id"].str[1:].astype(int)  # between prompts: does not count

    def std(name):
        parts = [part[name].to_numpy() for _, part in frame.groupby("prompt_id")]
        squares = sum(((x - x.mean()) ** 2).sum() for x in parts)
        return np.sqrt(squares / sum(len(x) - 1 for x in parts))

    floor = multiplier_floor(frame, "r", ["h", "g"])
    assert list(floor.index) == ["h", "g"]
    np.testing.assert_allclose(floor, [0.1 * std("r") / std(name) for name in ("h", "g")])
    again = multiplier_floor(frame.sample(frac=1, random_state=3), "r", ["h", "g"])
    pd.testing.assert_series_equal(again, floor, check_exact=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"g": 100.1}, "column g is constant within prompts.*--floor"),
        ({"r": 0.3}, "column r is constant within prompts"),
        ({"g": np.nan}, "column g is not a finite number"),
        ({"prompt_id": None}, "column prompt_id is null in row 0"),
        ({"prompt_id": [f"q{i}" for i in range(240)]}, "no prompt has two responses"),
    ],
)
def test_a_table_without_scale_gives_no_floor(change, match):
    with pytest.raises(UserError, match=match):
        multiplier_floor(frame_of().assign(**change), "r", ["g"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"g": (-1.0, 0.1)}, "lambda of g is -1"),
        ({"g": (np.inf, 0.1)}, "lambda of g is inf"),
        ({"g": (1.0, 0.0)}, "floor of g is 0.0; give a finite number > 0"),
        ({"g": (1.0, np.nan)}, "floor of g is nan"),
        ({"factor": 1.0}, "the factor is 1.0; give a finite number > 1"),
        ({"factor": np.inf}, "the factor is inf"),
        ({"kappa": (0.0, 1.5)}, r"range of κ is 0.0 to 1.5; give 0 < low < high"),
        ({"kappa": (1.5, 0.5)}, "range of κ is 1.5 to 0.5"),
        ({"kappa": (0.5, np.nan)}, "range of κ is 0.5 to nan"),
    ],
)
def test_bad_ranges_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        range_of(**{"g": (0.4, 0.1), **change})
    with pytest.raises(UserError, match="center is of g, floor of h"):
        MultiplierRange(pd.Series({"g": 1.0}), pd.Series({"h": 1.0}), 3.0)
