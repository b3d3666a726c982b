"""Prompt files with a mistake, kind by kind, through the real command line: one line that says what
and where; exit 2; nothing written."""

import gzip
import json

import pytest

PROMPTS = [
    f"{who} open {what}"
    for who in ("kid", "boss", "pirate")
    for what in ("safe", "dog", "door", "car")
]


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


FEW = jsonl(*({"prompt": p} for p in PROMPTS))
FILES = {
    "none": ("p.jsonl", None, "no such file"),
    "empty": ("p.jsonl", b"", "no prompts in it"),
    "blank lines": ("p.jsonl", b"\n\n", "no prompts in it"),
    "broken lines": (
        "p.jsonl",
        FEW + b'{"prompt": \n[1]\n',
        "line 13: not valid JSON (Expecting value at character 11)",
    ),
    "broken JSON file": (
        "p.json",
        b'[{"prompt": "a"},\n {"prompt": }]',
        "p.json:2: not valid JSON",
    ),
    "no prompt column": (
        "p.jsonl",
        jsonl({"question": "a"}),
        "line 1: no `prompt` (it has question)",
    ),
    "prompt null": ("p.jsonl", FEW + jsonl({"prompt": None}), "line 13"),
    "prompt a number": ("p.jsonl", FEW + jsonl({"prompt": 7}), "line 13"),
    "prompt blank": ("p.jsonl", FEW + jsonl({"prompt": "  "}), "line 13: the prompt is empty"),
    "chat ends with the assistant": (
        "p.jsonl",
        jsonl({"prompt": [{"role": "assistant", "content": "hi"}]}),
        "ends with the user",
    ),
    "chat in a text recipe": (
        "p.jsonl",
        jsonl({"prompt": [{"role": "user", "content": "hi"}]}),
        "set prompts.format: chat",
    ),
    "chat of no messages": ("p.jsonl", jsonl({"prompt": []}), "line 1: the prompt is empty"),
    "one prompt, many times": ("p.jsonl", jsonl({"prompt": "a"}) * 9, "both need at least 2"),
    "not UTF-8": ("p.jsonl", b'{"prompt": "\xe9"}\n', "cannot be read"),
    "csv not UTF-8": ("p.csv", b"prompt\ncaf\xe9\n", "not a readable csv"),
    "csv empty": ("p.csv", b"", "not a readable csv"),
    "csv header only": ("p.csv", b"prompt\n", "no prompts in it"),
    "csv with a hole": ("p.csv", b"prompt,x\na,1\n,2\n", "line 3: the prompt is empty"),
    "truncated gzip": ("p.jsonl.gz", gzip.compress(FEW)[:40], "cannot be read"),
    "not a gzip": ("p.csv.gz", b"prompt\na\n", "not a readable csv"),
    "truncated parquet": ("p.parquet", b"PAR1 and then nothing", "not a readable parquet file"),
    "unknown ending": ("p.xlsx", b"", "unknown ending .xlsx"),
    "HH rows that are none": (
        "p.jsonl",
        jsonl({"chosen": "hello", "rejected": "x"}),
        "line 1: not a dialogue",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_good_prompts_is_refused(kind, refused, tmp_path):
    name, text, match = FILES[kind]
    if text is not None:
        (tmp_path / name).write_bytes(text)
    output = tmp_path / "out.parquet"
    line = refused("data", "prompts", tmp_path / name, "-o", output, match=match)
    assert name in line or kind == "one prompt, many times"
    assert not output.exists()


def test_prompts_in_a_folder_and_a_share_over_one_are_refused(refused, tmp_path):
    output, file = ("-o", tmp_path / "out.parquet"), tmp_path / "p.jsonl"
    empty = "no such file: a folder without parquet or jsonl files"
    refused("data", "prompts", tmp_path, *output, match=empty)
    file.write_bytes(FEW)
    refused("data", "prompts", file, "--test", "1.5", *output, match="between 0 and 1")
