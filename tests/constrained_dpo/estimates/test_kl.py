"""Controls: what log π_θ/π_ref − path_kl explains is taken out, and no expectation moves."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.estimates.kl import controlled, kl_values, path_noise


def columns(rng: np.random.Generator, prompts: int, responses: int) -> pd.DataFrame:
    """Samples with noise of mean 0 at every prompt, and scores that hold half of it."""
    ids = np.repeat([f"p{i:04d}" for i in range(prompts)], responses)
    path, noise = rng.gamma(2, 0.1, len(ids)), rng.normal(size=len(ids))
    score = 0.5 * noise + 0.3 * rng.normal(size=len(ids)) + np.repeat(rng.normal(size=prompts), 8)
    return pd.DataFrame(
        {
            "prompt_id": ids,
            "policy_logp": -5.0 + path + noise,
            "ref_logp": -5.0,
            "path_kl": path,
            "score": score,
        }
    )


def test_the_noise_is_what_the_log_ratio_has_beside_the_path_kl():
    table = columns(np.random.default_rng(0), 4, 8)
    assert kl_values(table).equals(table["path_kl"])
    ratio = table["policy_logp"] - table["ref_logp"]
    assert path_noise(table).to_numpy() == pytest.approx((ratio - table["path_kl"]).to_numpy())
    elsewhere = table.assign(path_kl=np.nan)  # tables without it, such as a dataset's
    assert kl_values(elsewhere).equals(ratio) and (path_noise(elsewhere) == 0).all()


def test_controlled_means_are_unbiased_and_less_spread_within_prompts():
    table = columns(np.random.default_rng(0), 2000, 8)
    noise, prompts = path_noise(table), table["prompt_id"]
    ours = controlled(table["score"], noise, prompts).groupby(prompts).mean()
    plain = table["score"].groupby(prompts).mean()
    difference = ours - plain
    assert abs(difference.mean()) < 4 * difference.sem()
    within = [
        (values - values.groupby(prompts).transform("mean")).std()
        for values in (table["score"], controlled(table["score"], noise, prompts))
    ]
    assert within[1] == pytest.approx(0.3 * np.sqrt(7 / 8), rel=0.05) and within[0] > 0.5


def test_a_prompts_coefficient_does_not_come_from_itself():
    """Two prompts: each is corrected by the other's slope."""
    noise = pd.Series([1.0, -1.0, 2.0, -2.0])
    values = pd.Series([3.0, -3.0, 2.0, -2.0])  # slopes 3 and 1
    prompts = pd.Series(["a", "a", "b", "b"])
    corrected = controlled(values, noise, prompts)
    assert corrected.tolist() == pytest.approx([2.0, -2.0, -4.0, 4.0])
    one = controlled(values[:2], noise[:2], prompts[:2])
    assert one.tolist() == [3.0, -3.0]  # nothing to learn a slope from
