"""Groups: how they are drawn, and how `cdpo data relabel` writes them."""

import json

import numpy as np
import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.labels.groups import label_groups
from data_prep.readers.tables import read_parquet
from data_prep.tables import validate_groups
from tests.helpers.cli import cdpo
from tests.helpers.tables import scored_frame

LAMBDA = pd.Series({"g": 0.7})


def grouped(frame, size=3, count=4, seed=0, round_number=0):
    return label_groups(
        frame,
        "r",
        LAMBDA,
        group_size=size,
        groups_per_prompt=count,
        seed=seed,
        round_number=round_number,
    )


def test_groups_use_every_response_before_any_comes_again():
    frame = scored_frame(0, 5, 11)
    groups = validate_groups(grouped(frame, size=3, count=7), "groups")
    assert len(groups) == 5 * 7 * 3
    assert groups.groupby("prompt_id")["group_id"].nunique().eq(7).all()
    assert groups.groupby("group_id")["prompt_id"].nunique().eq(1).all()
    assert not groups.duplicated(["group_id", "response_id"]).any()
    number = groups["group_id"].str.rpartition("/")[2].astype(int)
    for first in (0, 3):  # 11 responses are 3 whole groups of 3 a pass
        one_pass = groups[(number >= first) & (number < first + 3)]
        assert not one_pass["response_id"].duplicated().any()
    owner = frame.set_index("response_id")["prompt_id"]
    assert (groups["response_id"].map(owner) == groups["prompt_id"]).all()
    score = frame.set_index("response_id").eval("r + 0.7 * g")
    np.testing.assert_allclose(groups["score"], groups["response_id"].map(score), rtol=1e-15)


def test_groups_depend_on_seed_and_round_but_not_on_the_order_of_rows():
    frame = scored_frame(1, 6, 8)
    pd.testing.assert_frame_equal(grouped(frame), grouped(frame.sample(frac=1, random_state=3)))
    assert not grouped(frame).equals(grouped(frame, seed=1))
    assert not grouped(frame).equals(grouped(frame, round_number=1))


def test_prompts_with_too_few_responses_give_no_group():
    few = scored_frame(3, 1, 2).assign(prompt_id="few", response_id=["a", "b"])
    frame = pd.concat([scored_frame(2, 1, 8), few])
    assert set(grouped(frame)["prompt_id"]) == {"p0"}
    with pytest.raises(UserError, match=r"no prompt has 9 responses.*fit\.group_size 9"):
        grouped(frame, size=9)
    with pytest.raises(UserError, match="groups differ in size"):
        validate_groups(grouped(frame).iloc[1:], "groups")


def test_relabel_writes_groups_from_the_shell(tmp_path):
    scores, output = tmp_path / "scores.parquet", tmp_path / "groups.parquet"
    scored_frame(0, 5, 6).to_parquet(scores)
    relabel = ["data", "relabel", scores, "--reward", "r", "--lambda", "g=0.7"]
    relabel += ["--group-size", "3", "--groups-per-prompt", "2"]
    facts = json.loads(cdpo(*relabel, "--json", "-o", output, check=0).stdout)
    assert facts["groups"] == 10
    pd.testing.assert_frame_equal(read_parquet(output), grouped(read_parquet(scores), count=2))
    refusal = cdpo(*relabel, "--text", "-o", tmp_path / "x.parquet", check=2).stderr
    assert "groups hold scores" in refusal
