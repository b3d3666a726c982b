"""`cdpo data relabel` on files: piece by piece it writes what `label_pairs` and `label_groups`
give."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.labels import preferences, relabel
from data_prep.labels.groups import label_groups
from data_prep.labels.pair_texts import PairTexts
from data_prep.labels.preferences import label_pairs
from data_prep.labels.relabel import relabel_groups, relabel_pairs
from tests.helpers.cli import cdpo
from tests.helpers.tables import scored_frame

LAMBDA = pd.Series({"g": 0.7})


@pytest.fixture(scope="module")
def frame():
    """701 ragged prompts (two with a single response), rows scattered over the file, rounded scores
    with ties, and texts."""
    table = scored_frame(0, 700, 12).sample(frac=0.6, random_state=0)
    lonely = {"prompt_id": ["lonely"], "response_id": ["one"], "r": [0.0], "g": [0.0]}
    table = pd.concat([table, pd.DataFrame(lonely)], ignore_index=True)
    return table.assign(
        r=table["r"].round(1),
        prompt="ask " + table["prompt_id"],
        response="say " + table["response_id"].str[-1],
    )


@pytest.fixture(scope="module")
def path(frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    frame.to_parquet(path, row_group_size=1000)
    return path


def pairs_of(path, output, **changes):
    rule = {"labels": "soft", "pairs_per_prompt": None, "seed": 3} | changes
    return relabel_pairs(path, output, "r", LAMBDA, **rule)


@pytest.mark.parametrize("piece_pairs", [200, preferences.PIECE_PAIRS])
@pytest.mark.parametrize(("labels", "count"), [("soft", None), ("bernoulli", 4), ("argmax", None)])
def test_pieces_give_the_pairs_of_the_whole_table(
    path, tmp_path, labels, count, piece_pairs, monkeypatch
):
    frame, output = pd.read_parquet(path), tmp_path / "p.parquet"
    rule = {"labels": labels, "pairs_per_prompt": count}
    whole = label_pairs(frame, "r", LAMBDA, seed=3, **rule)
    monkeypatch.setattr(preferences, "PIECE_PAIRS", piece_pairs)
    facts = pairs_of(path, output, texts=PairTexts(), **rule)
    written = pd.read_parquet(output)
    pd.testing.assert_frame_equal(written[list(whole)], whole, check_exact=True)
    texts = frame.set_index("response_id")["response"]
    for side in ("chosen", "rejected"):
        assert (written[side] == written[f"{side}_id"].map(texts)).all()
    assert (written["prompt"] == "ask " + written["prompt_id"]).all()
    assert facts["pairs"] == len(whole) and facts["left_out"] == {"single_response": 2}
    assert facts["prompts"] == whole["prompt_id"].nunique() == 699
    assert facts["ambiguous_fraction"] == (whole["prob"].sub(0.5).abs() < 0.45).mean()
    assert [f.name for f in tmp_path.iterdir()] == ["p.parquet"]
    assert (pq.ParquetFile(output).num_row_groups > 10) == (piece_pairs == 200)


@pytest.mark.parametrize("groups_at_once", [100, relabel.GROUPS_AT_ONCE])
def test_pieces_give_the_groups_of_the_whole_table(path, groups_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(relabel, "GROUPS_AT_ONCE", groups_at_once)
    rule = {"group_size": 3, "groups_per_prompt": 4, "seed": 5}
    facts = relabel_groups(path, tmp_path / "g.parquet", "r", LAMBDA, **rule)
    whole = label_groups(pd.read_parquet(path), "r", LAMBDA, **rule)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "g.parquet"), whole, check_exact=True)
    assert facts["groups"] == whole["group_id"].nunique()
    assert facts["prompts"] + facts["too_few_responses"] == 701


def test_prompts_come_from_a_table_beside(frame, tmp_path):
    bare, table, output = (tmp_path / f"{name}.parquet" for name in ("bare", "prompts", "p"))
    prompts = pd.DataFrame({"prompt_id": frame["prompt_id"].unique()})
    prompts = prompts.assign(prompt="question " + prompts["prompt_id"])
    prompts.to_parquet(table)
    frame.drop(columns="prompt").to_parquet(bare)
    relabel, beside = ["data", "relabel", bare, "--reward", "r", "-o", output], ["--prompts", table]
    cdpo(*relabel, "--text", *beside, check=0)
    written = pd.read_parquet(output)
    assert (written["prompt"] == "question " + written["prompt_id"]).all()
    assert "missing column prompt" in cdpo(*relabel, "--text", check=2).stderr
    assert "only --text writes prompts" in cdpo(*relabel, *beside, check=2).stderr
    prompts.iloc[1:].to_parquet(table)
    refusal = cdpo(*relabel, "--text", *beside, check=2).stderr
    assert f"has no prompt_id {prompts['prompt_id'][0]!r}" in refusal


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.assign(r=f["r"].where(f.index != 2000)), "column r is not a finite number in"),
        (
            lambda f: f.assign(g=f["g"].where(f.index != 2000, np.inf)),
            "column g is not a finite number in",
        ),
        (
            lambda f: f.assign(
                response_id=f["response_id"].where(f.index != 4000, f["response_id"][0])
            ),
            "duplicated response_id: '(y|one)",
        ),
        (
            lambda f: f.assign(prompt_id=f["prompt_id"].where(f.index != 4000)),
            "column prompt_id is null in row 4000",
        ),
        (
            lambda f: f.assign(response=f["response"].where(f.index != 4000)),
            "column response is not a text in row 4000",
        ),
        (lambda f: f.drop(columns="g"), "missing column g"),
        (lambda f: f.assign(prompt_id=f["response_id"]), "no prompt has two responses"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing_behind(frame, tmp_path, change, match):
    change(frame).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=match):
        pairs_of(tmp_path / "bad.parquet", tmp_path / "p.parquet", texts=PairTexts())
    assert [f.name for f in tmp_path.iterdir()] == ["bad.parquet"]


def test_a_file_cut_short_is_one_line(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[2000:40000] = bytes(38000)  # the footer still reads
    (tmp_path / "broken.parquet").write_bytes(data)
    with pytest.raises(UserError, match="not a readable parquet file"):
        pairs_of(tmp_path / "broken.parquet", tmp_path / "p.parquet")
    assert [f.name for f in tmp_path.iterdir()] == ["broken.parquet"]


def test_ids_that_are_numbers_are_written_as_text(tmp_path):
    scores, output = tmp_path / "s.csv", tmp_path / "p.parquet"
    frame = scored_frame(1, 30, 4)
    numbers = frame["prompt_id"].str[1:].astype(int)
    frame.assign(prompt_id=numbers, response_id=np.arange(120)).to_csv(scores, index=False)
    relabel = ["data", "relabel", scores, "--reward", "r", "--json", "-o", output]
    assert json.loads(cdpo(*relabel, check=0).stdout)["pairs"] == 180
    assert set(pd.read_parquet(output)["prompt_id"]) == {str(i) for i in range(30)}
