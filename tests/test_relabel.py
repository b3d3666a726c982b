"""`cdpo data relabel` on files: block by block it writes what the whole table gives in memory, in memory that does not grow with it."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import scored_frame
from test_cli import cdpo

from data_prep import relabel
from data_prep.preferences import label_groups, label_pairs
from data_prep.relabel import relabel_groups, relabel_pairs
from data_prep.settings import UserError

LAMBDA = pd.Series({"g": 0.7})


@pytest.fixture(scope="module")
def frame():
    """701 ragged prompts (two with a single response), rows scattered over the file, rounded scores with ties, and texts."""
    table = scored_frame(0, 700, 12).sample(frac=0.6, random_state=0)
    table = pd.concat([table, pd.DataFrame({"prompt_id": ["lonely"], "response_id": ["one"], "r": [0.0], "g": [0.0]})])
    table = table.assign(r=table["r"].round(1), prompt="ask " + table["prompt_id"], response="say " + table["response_id"].str[-1])
    return table.reset_index(drop=True)


@pytest.fixture(scope="module")
def path(frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    frame.to_parquet(path, row_group_size=1000)
    return path


def pairs_of(path, output, **changes):
    rule = {"labels": "soft", "pairs_per_prompt": None, "seed": 3, "text": False} | changes
    return relabel_pairs(path, output, "r", LAMBDA, **rule)


@pytest.fixture(scope="module")
def in_order(frame, tmp_path_factory):
    """The same rows sorted by prompt, one of which has more rows than a block of 100 or a batch."""
    path = tmp_path_factory.mktemp("sorted") / "scores.parquet"
    more = frame.iloc[:1].assign(prompt_id="p3", prompt="ask p3").loc[[0] * 400].assign(response_id=[f"more {i}" for i in range(400)])
    pd.concat([frame, more]).sort_values("prompt_id", kind="stable").to_parquet(path, row_group_size=1000, index=False)
    return path


@pytest.mark.parametrize("kind", ["scattered", "sorted"])
@pytest.mark.parametrize("block_rows", [100, 1 << 16])
@pytest.mark.parametrize(("labels", "count"), [("soft", None), ("bernoulli", 4), ("argmax", None)])
def test_blocks_give_the_pairs_of_the_whole_table(path, in_order, kind, tmp_path, labels, count, block_rows, monkeypatch):
    path = path if kind == "scattered" else in_order
    frame = pd.read_parquet(path)
    assert (relabel._bounds(path, 100) is None) == (kind == "sorted")
    monkeypatch.setattr(relabel, "BLOCK_ROWS", 300)  # the batches that are read
    facts = pairs_of(path, tmp_path / "p.parquet", labels=labels, pairs_per_prompt=count, text=True, block_rows=block_rows)
    whole = label_pairs(frame, "r", LAMBDA, labels=labels, pairs_per_prompt=count, seed=3)
    written = pd.read_parquet(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(written[list(whole)], whole, check_exact=True)
    texts = frame.set_index("response_id")["response"]
    assert (written["chosen"] == written["chosen_id"].map(texts)).all() and (written["rejected"] == written["rejected_id"].map(texts)).all()
    assert (written["prompt"] == "ask " + written["prompt_id"]).all()
    assert facts["pairs"] == len(whole) and facts["prompts"] == whole["prompt_id"].nunique() == 699 and facts["single_response"] == 2
    assert facts["ambiguous_fraction"] == (whole["prob"].sub(0.5).abs() < 0.45).mean()
    assert [f.name for f in tmp_path.iterdir()] == ["p.parquet"]
    blocks = pq.ParquetFile(tmp_path / "p.parquet").num_row_groups
    assert blocks > (40 if kind == "scattered" else 10) if block_rows == 100 else blocks == 1


@pytest.mark.parametrize("kind", ["scattered", "sorted"])
def test_blocks_give_the_groups_of_the_whole_table(path, in_order, kind, tmp_path):
    path = path if kind == "scattered" else in_order
    frame = pd.read_parquet(path)
    rule = {"group_size": 3, "groups_per_prompt": 4, "seed": 5}
    facts = relabel_groups(path, tmp_path / "g.parquet", "r", LAMBDA, block_rows=100, **rule)
    whole = label_groups(frame, "r", LAMBDA, **rule)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "g.parquet"), whole, check_exact=True)
    assert facts["groups"] == whole["group_id"].nunique() and facts["prompts"] + facts["too_few_responses"] == 701


def test_prompts_come_from_their_own_table(frame, path, tmp_path):
    prompts = pd.DataFrame({"prompt_id": frame["prompt_id"].unique()}).assign(prompt=lambda f: "question " + f["prompt_id"])
    prompts.to_parquet(tmp_path / "prompts.parquet")
    frame.drop(columns="prompt").to_parquet(tmp_path / "bare.parquet")
    arguments = ["data", "relabel", tmp_path / "bare.parquet", "--reward", "r", "--text", "-o", tmp_path / "p.parquet"]
    cdpo(*arguments, "--prompts", tmp_path / "prompts.parquet", check=0)
    written = pd.read_parquet(tmp_path / "p.parquet")
    assert (written["prompt"] == "question " + written["prompt_id"]).all()
    assert "missing column prompt" in cdpo(*arguments, check=2).stderr
    prompts.iloc[1:].to_parquet(tmp_path / "prompts.parquet")
    assert f"has no prompt_id {prompts['prompt_id'][0]!r}" in cdpo(*arguments, "--prompts", tmp_path / "prompts.parquet", check=2).stderr
    assert "only --text writes prompts" in cdpo(*(a for a in arguments if a != "--text"), "--prompts", "x", check=2).stderr


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.assign(r=f["r"].where(f.index != 2000)), "column r is not a finite number in"),
        (lambda f: f.assign(g=f["g"].where(f.index != 2000, np.inf)), "column g is not a finite number in"),
        (lambda f: f.assign(response_id=f["response_id"].where(f.index != 4000, f["response_id"][0])), "duplicated response_id: '(y|one)"),
        (lambda f: f.assign(prompt_id=f["prompt_id"].where(f.index != 4000)), "column prompt_id is null in row 4000"),
        (lambda f: f.assign(response=f["response"].where(f.index != 4000)), "column response is not a text in row 4000"),
        (lambda f: f.drop(columns="g"), "missing column g"),
        (lambda f: f.assign(prompt_id=f["response_id"]), "no prompt has two responses"),
    ],
)
@pytest.mark.parametrize("kind", ["scattered", "sorted"])
def test_bad_rows_are_named_as_in_memory_and_leave_nothing_behind(frame, kind, tmp_path, change, match):
    if kind == "sorted":
        frame = frame.sort_values("prompt_id", kind="stable").reset_index(drop=True)
    change(frame).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=match):
        pairs_of(tmp_path / "bad.parquet", tmp_path / "p.parquet", text=True, block_rows=100)
    assert [f.name for f in tmp_path.iterdir()] == ["bad.parquet"]


def test_a_file_cut_short_is_one_line(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[2000:40000] = bytes(38000)  # the footer still reads
    (tmp_path / "broken.parquet").write_bytes(data)
    with pytest.raises(UserError, match="not a readable parquet file"):
        pairs_of(tmp_path / "broken.parquet", tmp_path / "p.parquet", block_rows=100)
    assert [f.name for f in tmp_path.iterdir()] == ["broken.parquet"]


def test_ids_that_are_numbers_are_written_as_text(tmp_path):
    frame = scored_frame(1, 30, 4).assign(prompt_id=lambda f: f["prompt_id"].str[1:].astype(int), response_id=np.arange(120))
    frame.to_csv(tmp_path / "s.csv", index=False)
    facts = cdpo("data", "relabel", tmp_path / "s.csv", "--reward", "r", "--json", "-o", tmp_path / "p.parquet", check=0).stdout
    assert json.loads(facts)["pairs"] == 180 and set(pd.read_parquet(tmp_path / "p.parquet")["prompt_id"]) == {str(i) for i in range(30)}


PEAK = """
import sys
from constrained_dpo.cli import app
app(["data", "relabel", sys.argv[1], "--reward", "r", "--lambda", "g=0.7", "-o", sys.argv[1] + ".out"], standalone_mode=False)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.parametrize("kind", ["scattered", "sorted"])
def test_memory_does_not_grow_with_the_table(kind, tmp_path):
    """Ten times the responses. Their hashes alone grow, by 8 bytes each (7 MB); the frame of 3.5 million pairs
    that label_pairs would make has 400 MB."""
    peaks = []
    for prompts in (12_500, 125_000):
        table = scored_frame(prompts, prompts, 8)
        table = table.sample(frac=1, random_state=0) if kind == "scattered" else table.sort_values("prompt_id")
        table.to_parquet(tmp_path / f"{prompts}.parquet", row_group_size=1 << 17)
        command = [sys.executable, "-c", PEAK, str(tmp_path / f"{prompts}.parquet")]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 80, peaks
