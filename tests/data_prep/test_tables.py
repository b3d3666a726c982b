"""Schemas, validation messages and atomic writing."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet, read_table, write_parquet
from data_prep.tables import validate_prompts, validate_responses


def responses(**changes) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "prompt_id": ["p", "p", "q"],
            "response_id": ["a", "b", "c"],
            "response": ["x", "", "z"],
            "token_ids": [
                np.array([1, 2], np.int32),
                np.array([2], np.int32),
                np.array([3], np.int32),
            ],
            "ended": [True, True, False],
            "source": "reference",
            "sample_logp": [-1.0, -2.0, np.nan],
            "policy_logp": [-1.0, -2.0, -3.0],
            "ref_logp": [-1.0, -2.0, -3.0],
            "path_kl": [0.0, 0.5, np.nan],
            "helpful": [0.1, 0.2, 0.3],
        }
    )
    return frame.assign(**changes)


def test_a_table_survives_the_file(tmp_path):
    frame = validate_responses(responses(), ["helpful"], "t")
    write_parquet(frame, tmp_path / "t.parquet")
    again = validate_responses(read_parquet(tmp_path / "t.parquet"), ["helpful"], "t")
    assert [list(ids) for ids in again["token_ids"]] == [[1, 2], [2], [3]]
    assert again["token_ids"][0].dtype == np.int32
    pd.testing.assert_frame_equal(
        again.drop(columns="token_ids"), frame.drop(columns="token_ids"), check_dtype=False
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "t.parquet"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"helpful": [0.1, np.nan, 0.3]}, r"column helpful is not a finite number in 'b'"),
        ({"helpful": [0.1, 0.2, -np.inf]}, r"column helpful is not a finite number in 'c'"),
        ({"response_id": ["a", "a", "c"]}, r"duplicated response_id: 'a'"),
        ({"response": ["x", None, "z"]}, r"response is null in 'b'"),
        ({"policy_logp": [-1.0, 0.5, -3.0]}, r"policy_logp is not a log-probability in 'b'"),
        ({"path_kl": [0.0, -0.5, 0.1]}, r"path_kl is not a divergence in 'b'"),
        ({"token_ids": [[1], [], [2]]}, r"token_ids is empty in 'b'"),
    ],
)
def test_bad_rows_are_named(changes, match):
    with pytest.raises(UserError, match=match):
        validate_responses(responses(**changes), ["helpful"], "t")


def test_missing_columns_and_empty_tables():
    with pytest.raises(UserError, match="missing column ended; it has"):
        validate_responses(responses().drop(columns="ended"), ["helpful"], "t")
    with pytest.raises(UserError, match="missing column humor"):
        validate_responses(responses(), ["humor"], "t")
    with pytest.raises(UserError, match="no rows"):
        validate_responses(responses().head(0), ["helpful"], "t")
    with pytest.raises(UserError, match="split is not one of"):
        validate_prompts(
            pd.DataFrame({"prompt_id": ["a"], "prompt": ["x"], "split": ["train"]}), "t"
        )


def test_broken_files_are_named_with_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": 1}\n\n{"prompt"\n[1]\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl: line 3: not valid JSON .*; line 4: not a JSON object; mend or"
    ):
        read_table(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[{"a": 1},\n {"b": }]')
    with pytest.raises(UserError, match=r"a\.json:2: not valid JSON"):
        read_table(tmp_path / "a.json")
    write_parquet(responses(), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable parquet file"):
        read_parquet(tmp_path / "cut.parquet")
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "t.xls").write_text("")
    with pytest.raises(UserError, match="unknown ending"):
        read_table(tmp_path / "t.xls")


WRITER = """
import os, sys, numpy as np, pandas as pd
from pathlib import Path
from data_prep.readers.tables import write_parquet
x = np.random.default_rng(0).normal(size=60000)
frame = pd.DataFrame({"prompt_id": [str(i) for i in range(60000)], "x": x})
for _ in sys.stdin:  # a new writer per line: the libraries are imported once
    writer = os.fork()
    while writer == 0:
        write_parquet(frame, Path(sys.argv[1]) / "t.parquet")
    print(writer, flush=True)
    os.waitpid(writer, 0)
"""


def test_a_file_is_never_seen_half_written(tmp_path):
    """A real writer replaces the table over and over and is killed at ten moments: what a reader
    finds is always whole."""
    table, command = tmp_path / "t.parquet", [sys.executable, "-c", WRITER, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        for attempt in range(10):
            process.stdin.write("start\n")
            writer = int(process.stdout.readline())
            deadline = time.time() + 0.03 + 0.017 * attempt
            while time.time() < deadline:
                if table.exists():
                    assert len(read_parquet(table)) == 60000
            os.kill(writer, signal.SIGKILL)
            if table.exists():
                assert len(read_parquet(table)) == 60000
        process.stdin.close()
    assert table.exists() and process.returncode == 0
