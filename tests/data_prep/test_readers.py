"""One reader per format: what users' tables really hold is read as it is written, or named."""

import json

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.score_files import read_scores
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from data_prep.prompts.split import read_prompts
from data_prep.readers.tables import read_table

IDS = ["001", "1", "01", "1e3", "0x1", "NA", "null", "True", "12345678901234567890"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "ndjson", "parquet", "CSV"])
def test_ids_and_texts_that_look_like_numbers_stay_texts(ending, tmp_path):
    answers = ["007", "NA", "nan", "", "None", "1.50", "null", "-0", "true"]
    frame = pd.DataFrame({"prompt_id": IDS, "response": answers, "score": range(9)})
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        frame.to_parquet(path)
    elif "json" in ending:
        frame.to_json(path, orient="records", lines=ending != "json")
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    table = read_table(path, texts=["response"])
    assert table["prompt_id"].tolist() == IDS and table["response"].tolist() == answers
    assert table["score"].dtype == np.int64


def test_ids_that_are_numbers_are_the_same_text_in_every_format(tmp_path):
    pd.DataFrame({"prompt_id": [1.0, np.nan, 3.0]}).to_parquet(tmp_path / "floats.parquet")
    pd.DataFrame({"prompt_id": [1, 2, 3]}).to_parquet(tmp_path / "numbers.parquet")
    groups = pd.DataFrame({"prompt_id": pd.Categorical(["1", "2", "3"])})
    groups.to_parquet(tmp_path / "groups.parquet")
    rows = [1.0, "2", 3]
    text = "".join(json.dumps({"prompt_id": value}) + "\n" for value in rows)
    (tmp_path / "mixed.jsonl").write_text(text)
    for name in ("numbers.parquet", "groups.parquet", "mixed.jsonl"):
        assert read_table(tmp_path / name)["prompt_id"].tolist() == ["1", "2", "3"]
    floats = read_table(tmp_path / "floats.parquet")["prompt_id"]
    assert floats[0] == "1" and floats.isna().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [True, [1], {"a": 1}])
def test_what_is_no_id_is_named_with_its_line(value, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt_id": "a"}\n\n' + json.dumps({"prompt_id": value}) + "\n")
    with pytest.raises(UserError, match=r"line 3: prompt_id is .*, not an id"):
        read_table(path)


def test_an_empty_cell_is_missing_in_ids_and_numbers_alone(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt_id,response,r,note,code,ended\na,,1.5,,007,True\n,x,,y,010,False\n")
    table = read_table(path)
    assert table["prompt_id"].isna().tolist() == [False, True]
    assert table["response"].tolist() == ["", "x"] and table["note"].tolist() == ["", "y"]
    assert table["r"].isna().tolist() == [False, True] and table["r"][0] == 1.5
    assert table["code"].tolist() == ["007", "010"] and table["ended"].tolist() == [True, False]


def test_numbers_of_a_csv_are_those_that_were_written(tmp_path):
    values = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-100, 100)
    pd.DataFrame({"r": values}).to_csv(tmp_path / "t.csv", index=False)
    np.testing.assert_array_equal(read_table(tmp_path / "t.csv")["r"].to_numpy(), values)


def test_words_among_scores_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt_id,r,g\np,1,0\np,NA,1\n")
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", 0.1),))
    with pytest.raises(UserError, match="column r is not a finite number in row 1"):
        read_scores(path, problem)


SAME = {
    "byte-order mark": ("t.jsonl", "\ufeff" + '{"prompt": "a"}\n{"prompt": "b"}\n'),
    "byte-order mark in a csv": ("t.csv", "\ufeffprompt\na\nb\n"),
    "byte-order mark in a json": ("t.json", "\ufeff" + '[{"prompt": "a"}, {"prompt": "b"}]'),
    "lines in a json": ("t.json", '{"prompt": "a"}\n\n{"prompt": "b"}'),
    "lines in a json with CRLF": ("t.json", '\r\n{"prompt": "a"}\r\n{"prompt": "b"}\r\n'),
    "ndjson": ("t.ndjson", '{"prompt": "a"}\r\n{"prompt": "b"}'),
    "capitals": ("t.JSONL", '{"prompt": "a"}\n{"prompt": "b"}'),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_rows_in_other_clothes(kind, tmp_path):
    name, text = SAME[kind]
    (tmp_path / name).write_bytes(text.encode())
    assert read_table(tmp_path / name)["prompt"].tolist() == ["a", "b"]
    assert list(read_prompts(str(tmp_path / name), "text")[0]) == ["a", "b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
def test_a_line_ends_at_a_line_feed_alone(separator, tmp_path):
    text = f"one{separator}two"
    for name in ("t.jsonl", "t.json"):
        line = json.dumps({"prompt": text}, ensure_ascii=False) + "\n"
        (tmp_path / name).write_text(line + line, encoding="utf-8")
        assert read_table(tmp_path / name)["prompt"].tolist() == [text, text]
        assert list(read_prompts(str(tmp_path / name), "text")[0]) == [text]
    (tmp_path / "t.csv").write_text(f'prompt,r\n"{text}",1\n', encoding="utf-8", newline="")
    assert read_table(tmp_path / "t.csv")["prompt"].tolist() == [text]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_long_field_is_read(ending, tmp_path):
    text, path = "word " * 60_000, tmp_path / f"t.{ending}"
    line = json.dumps({"prompt": text}) if ending == "jsonl" else f"prompt\n{text}"
    path.write_text(line + "\n")
    assert read_table(path)["prompt"].tolist() == [text]
    assert read_prompts(str(path), "text")[0].tolist() == [text]


BROKEN = {
    "half a character": ("t.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "line 2: .ud83d"),
    "the other half": ("t.json", b'[{"prompt": "a"}, {"prompt": "\\uDE00 x"}]', "item 2: .ude00"),
    "half a key": ("t.ndjson", b'{"prompt": "a", "\\udbff": 1}\n', "line 1: .udbff is half"),
    "half in lines of a json": ("t.json", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}', "line 2: .ud"),
    "broken line of a json": ("t.json", b'{"prompt": "a"}\n{"prompt": }\n', "line 2: not valid"),
    "open quote": ("t.csv", b'prompt,r\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data"),
    "text behind a quote": ("t.tsv", b'prompt\tr\n"hi" she said\t1\n', "line 2: "),
    "too few cells": ("t.csv", b"prompt,r\na,1\nb\n", r"line 3: fewer cells than the header"),
    "a column twice": ("t.csv", b"prompt,r,r\na,1,2\n", "two columns are called r"),
    "not UTF-8": ("t.csv", b"prompt\na\ncaf\xe9\n", "line 3 is not UTF-8"),
    "UTF-16": ("t.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_cannot_be_read_is_named(kind, tmp_path):
    name, content, match = BROKEN[kind]
    (tmp_path / name).write_bytes(content)
    for read in (read_table, lambda path: read_prompts(str(path), "text")):
        with pytest.raises(UserError, match=match) as error:
            read(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1 and name in str(error.value)


def test_a_whole_character_in_two_escapes_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert read_table(tmp_path / "t.jsonl")["prompt"].tolist() == ["\U0001f600"]
