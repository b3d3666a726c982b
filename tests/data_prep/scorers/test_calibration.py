"""How far scores agree with labelled preferences."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from constrained_dpo.report.scorer_words import describe_calibration
from data_prep.errors import UserError
from data_prep.scorers.calibration import read_labelled_pairs, reliability
from data_prep.scorers.scoring import make_scorer
from data_prep.scorers.settings import ImplicitScorerSettings

BETA = 0.1


def test_reliability_of_a_calibrated_and_of_an_overconfident_scorer():
    """Labels drawn from the model's probabilities lie on the diagonal; the same labels under
    differences ×4 lie below it."""
    rng = np.random.default_rng(0)
    true = rng.normal(scale=2.0, size=20000)
    labels = np.where(rng.random(len(true)) < 1 / (1 + np.exp(-true)), 1, -1)
    honest, sharp = reliability(true * labels), reliability(4 * true * labels)
    for bin_ in honest["bins"]:
        claimed, tolerance = bin_["claimed"], 4 * np.sqrt(0.25 / bin_["pairs"])
        assert abs(claimed - bin_["observed"]) < tolerance
    assert honest["right"] == sharp["right"] and honest["log_loss"] < sharp["log_loss"]
    assert sharp["bins"][-1]["observed"] < sharp["bins"][-1]["claimed"] - 0.05
    assert sum(bin_["pairs"] for bin_ in honest["bins"]) == len(true)


def test_reliability_of_a_coin():
    coin = reliability(np.zeros(10))
    assert coin["right"] == 0.5 and coin["log_loss"] == pytest.approx(np.log(2))
    assert coin["bins"][-1]["claimed"] is None


def test_labelled_pairs_agree_with_a_scorer_as_computed_by_hand(adapter, handle, tmp_path):
    rng, words = np.random.default_rng(1), [f"w{i}" for i in range(5, 60)]
    rows = [
        {
            "prompt": rng.choice(words),
            "chosen": " ".join(rng.choice(words, 2)),
            "rejected": rng.choice(words),
        }
        for _ in range(12)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    def scorer(**keys):
        block = {"type": "implicit", "beta": BETA, "adapter": str(adapter)}
        return make_scorer(ImplicitScorerSettings(**block, **keys), handle)

    agreement = scorer(calibrate=str(path)).agreement()
    prompts, plain = [row["prompt"] for row in rows], scorer()
    chosen, rejected = (
        plain.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    difference = chosen - rejected
    assert agreement["right"] == (difference > 0).mean()
    assert agreement["pairs"] == agreement["pairs_in_file"] == 12
    assert agreement["log_loss"] == pytest.approx(np.log1p(np.exp(-difference)).mean())
    flipped = scorer(calibrate=str(path), negate=True).agreement()
    assert flipped["right"] == pytest.approx(1 - agreement["right"])
    lines = describe_calibration("g", {"beta": BETA, "std_within": 0.5, "labelled": agreement})
    assert "std within a prompt 0.5" in lines[0]
    low, high = stats.binomtest(7, 12).proportion_ci()  # Clopper and Pearson
    assert f"orders 58 % [{100 * low:.0f}, {100 * high:.0f}] of 12" in lines[1]


def test_a_response_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text(json.dumps({"prompt": "w1", "chosen": None, "rejected": "w2"}))
    with pytest.raises(UserError, match="column chosen is not a text in row 0"):
        read_labelled_pairs(path)


def test_many_labelled_pairs_are_thinned_and_counted(tmp_path):
    table = pd.DataFrame({"prompt": "p", "chosen": [str(i) for i in range(2000)], "rejected": "r"})
    table.to_parquet(tmp_path / "pairs.parquet")
    pairs, facts = read_labelled_pairs(tmp_path / "pairs.parquet")
    assert facts["pairs"] == len(pairs) == 512 and facts["pairs_in_file"] == 2000
    assert pairs["chosen"].iloc[[0, -1]].tolist() == ["0", "1999"] and pairs["chosen"].is_unique
