"""Bad input, kind by kind, through the real command line: one line that says what, where and what
to do; exit 2; nothing lost."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.helpers.paths import QUICKSTART
from tests.helpers.tables import scored_frame

PROMPTS = [
    f"{who} open {what}"
    for who in ("kid", "boss", "pirate")
    for what in ("safe", "dog", "door", "car")
]


# Recipes: a change of the embedded world's, or a whole text, and what the line says.


def put(path: str, value: object):
    """A change of a recipe: the value at a dotted key; `...` removes it."""

    def change(raw: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            raw = raw[int(key) if key.isdigit() else key]
        if value is ...:
            del raw[last]
        else:
            raw[int(last) if last.isdigit() else last] = value

    return change


def rename(path: str, new: str):
    """A change of a recipe: another name for a key."""

    def change(raw: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            raw = raw[key]
        raw[new] = raw.pop(last)

    return change


def second_constraint(raw: dict) -> None:
    raw["objective"]["constraints"] *= 2


RECIPES = {
    "unknown key": (put("fit.zzz", 1), "fit.zzz: unknown key"),
    "unknown block": (put("zzz", {"a": 1}), "zzz: unknown key"),
    "misspelt key": (
        rename("dual.step_size", "stepsize"),
        "dual.stepsize: unknown key; did you mean step_size?",
    ),
    "missing key": (put("objective.beta", ...), "objective.beta: missing"),
    "word for a number": (put("policy.lora.r", "eight"), "policy.lora.r"),
    "fraction for an integer": (put("seed", 1.5), "seed"),
    "number for a block": (put("dual", 3), "dual"),
    "list for a block": (put("sampling", [1]), "sampling"),
    "null for a block": (put("objective", None), "objective"),
    "block for a list": (put("objective.constraints", {"a": 1}), "objective.constraints"),
    "steps and epochs": (put("fit.epochs", 1), "exactly one of fit.steps and fit.epochs"),
    "neither steps nor epochs": (put("fit.steps", None), "exactly one of fit.steps and fit.epochs"),
    "margin and threshold": (put("objective.constraints.0.threshold", 1), "exactly one of margin"),
    "neither margin nor threshold": (
        put("objective.constraints.0.margin", None),
        "exactly one of margin",
    ),
    "infinite margin": (
        put("objective.constraints.0.margin", float("inf")),
        "objective.constraints.0.margin",
    ),
    "two constraints of one name": (second_constraint, "harmless is used twice"),
    "constraint named as the reward": (
        put("objective.constraints.0.name", "helpful"),
        "helpful is used twice",
    ),
    "reserved name": (
        put("objective.reward.name", "token_ids"),
        "token_ids is a reserved column name",
    ),
    "name that is no identifier": (put("objective.reward.name", "a b"), "objective.reward.name"),
    "beta 0": (put("objective.beta", 0), "objective.beta"),
    "beta nan": (put("objective.beta", float("nan")), "objective.beta"),
    "negative lambda": (put("dual.init", {"harmless": -1}), "lambda of harmless is -1"),
    "lambda of no constraint": (
        put("dual.init", {"harmful": 1}),
        "unknown harmful; missing harmless",
    ),
    "negative step scale": (put("dual.step_scale", {"harmless": -1}), "dual.step_scale"),
    "fixed lambda without values": (put("dual.method", "fixd"), "dual.method"),
    "temperature 0": (put("sampling.temperature", 0), "sampling.temperature"),
    "top_p over 1": (put("sampling.top_p", 1.5), "sampling.top_p"),
    "no room for a prompt": (put("fit.max_length", 3), "no room for a prompt"),
    "zero pairs": (put("fit.pairs_per_prompt", 0), "fit.pairs_per_prompt"),
    "negative seed": (put("seed", -1), "seed"),
    "unknown dtype": (put("policy.dtype", "float8"), "policy.dtype"),
    "unknown scorer type": (
        put("objective.reward.scorer.type", "pyton"),
        "objective.reward.scorer",
    ),
    "column scorer in a run": (
        put("objective.reward.scorer", {"type": "column", "file": "x", "column": "y"}),
        "cannot score fresh samples",
    ),
    "empty file": (b"", "a recipe is a mapping of keys"),
    "list for a mapping": (b"- name: a\n- seed: 1\n", "a recipe is a mapping of keys"),
    "key twice": (b"name: a\nseed: 1\nseed: 2\n", "'seed' is given twice"),
    "broken YAML": (b"name: [a\n", "not valid YAML"),
    "not UTF-8": ("name: caf\u00e9\n".encode("latin-1"), "not a text file"),
    "NUL byte": (b"name: a\0b\n", "not valid YAML"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipe(kind, refused, tmp_path):
    change, match = RECIPES[kind]
    path = tmp_path / "r.yaml"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        raw = yaml.safe_load(QUICKSTART.read_text())
        change(raw)
        path.write_text(yaml.safe_dump(raw))
    line = refused("init", path, tmp_path / "run", match=match)
    assert str(path) in line and not (tmp_path / "run").exists()


OVERRIDES = {
    "no value": ("fit.steps", "write KEY=VALUE"),
    "no key": ("=3", "write KEY=VALUE"),
    "broken value": ("objective.beta=[1", "not valid YAML"),
    "item that is not there": ("objective.constraints.nothing.margin=1", "no item nothing"),
    "key below a value": ("objective.beta.x=1", "beta is a value"),
    "unknown key": ("dual.stepsize=1", "did you mean step_size?"),
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_override(kind, refused, tmp_path):
    override, match = OVERRIDES[kind]
    refused("init", QUICKSTART, tmp_path / "run", "-s", override, match=match)
    assert not (tmp_path / "run").exists()


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


FEW = jsonl(*({"prompt": p} for p in PROMPTS))
PROMPT_FILES = {
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


@pytest.mark.parametrize("kind", PROMPT_FILES)
def test_prompt_file(kind, refused, tmp_path):
    name, text, match = PROMPT_FILES[kind]
    if text is not None:
        (tmp_path / name).write_bytes(text)
    line = refused("data", "prompts", tmp_path / name, "-o", tmp_path / "out.parquet", match=match)
    assert (name in line or kind == "one prompt, many times") and not (
        tmp_path / "out.parquet"
    ).exists()


def test_prompts_in_a_folder_and_a_share_over_one(refused, tmp_path):
    refused(
        "data",
        "prompts",
        tmp_path,
        "-o",
        tmp_path / "out.parquet",
        match="no such file: a folder without parquet or jsonl files",
    )
    (tmp_path / "p.jsonl").write_bytes(FEW)
    refused(
        "data",
        "prompts",
        tmp_path / "p.jsonl",
        "--test",
        "1.5",
        "-o",
        tmp_path / "out.parquet",
        match="between 0 and 1",
    )


# Tables of scores: what `dual solve` and `data relabel` are given.

SCORES = {
    "NaN score": ({"g": [np.nan]}, "column g is not a finite number in 'y0'"),
    "infinite score": ({"r": [np.inf]}, "column r is not a finite number in 'y0'"),
    "word as score": ({"g": ["good"]}, "column g is not a finite number in 'y0'"),
    "no utility column": ({"g": ...}, "missing column g"),
    "no reward column": ({"r": ...}, "missing column r"),
    "no prompt_id": ({"prompt_id": ...}, "missing column prompt_id"),
    "null prompt_id": ({"prompt_id": [None]}, "prompt_id"),
    "no rows": (None, "no rows"),
}


def bad_scores(changes: dict | None) -> pd.DataFrame:
    frame = scored_frame(0, 6, 4)
    if changes is None:
        return frame.head(0)
    for column, value in changes.items():
        if value is ...:
            frame = frame.drop(columns=column)
        else:
            frame[column] = [*value, *frame[column].iloc[len(value) :]]
    return frame


@pytest.mark.parametrize("command", ["solve", "relabel"])
@pytest.mark.parametrize("kind", SCORES)
def test_score_table(kind, command, refused, tmp_path):
    changes, match = SCORES[kind]
    bad_scores(changes).to_json(
        tmp_path / "s.jsonl", orient="records", lines=True
    ) if kind == "word as score" else bad_scores(changes).to_parquet(tmp_path / "s.parquet")
    table = next(tmp_path.iterdir())
    out = tmp_path / "out.parquet"
    if command == "solve":
        refused(
            "dual",
            "solve",
            table,
            "--reward",
            "r",
            "--constraint",
            "g=0.2",
            "--beta",
            "1",
            match=match,
        )
    else:
        refused(
            "data", "relabel", table, "--reward", "r", "--lambda", "g=0.5", "-o", out, match=match
        )
    assert not out.exists()


OPTIONS = {
    "negative lambda": (
        ["data", "relabel", "S", "--reward", "r", "--lambda", "g=-1", "-o", "O"],
        "lambda of g is -1",
    ),
    "lambda nan": (
        ["data", "relabel", "S", "--reward", "r", "--lambda", "g=nan", "-o", "O"],
        "lambda of g is nan",
    ),
    "lambda twice": (
        ["data", "relabel", "S", "--reward", "r", "--lambda", "g=1", "--lambda", "g=2", "-o", "O"],
        "each name once",
    ),
    "unknown labels": (
        ["data", "relabel", "S", "--reward", "r", "--labels", "hard", "-o", "O"],
        "not one of soft",
    ),
    "zero pairs": (
        ["data", "relabel", "S", "--reward", "r", "--pairs-per-prompt", "0", "-o", "O"],
        "a number ≥ 1, or all",
    ),
    "text without texts": (
        ["data", "relabel", "S", "--reward", "r", "--text", "-o", "O"],
        "missing column",
    ),
    "margin a word": (
        ["dual", "solve", "S", "--reward", "r", "--constraint", "g=one", "--beta", "1"],
        "write NAME=NUMBER",
    ),
    "margin nan": (
        ["dual", "solve", "S", "--reward", "r", "--constraint", "g=nan", "--beta", "1"],
        "g",
    ),
    "beta negative": (["dual", "solve", "S", "--reward", "r", "--beta", "-1"], "beta is -1"),
    "beta infinite": (["dual", "solve", "S", "--reward", "r", "--beta", "inf"], "beta is inf"),
    "utility is the reward": (
        ["dual", "solve", "S", "--reward", "r", "--constraint", "r=1", "--beta", "1"],
        "r is used twice",
    ),
    "max-lambda 0": (
        ["dual", "solve", "S", "--reward", "r", "--beta", "1", "--max-lambda", "0"],
        "--max-lambda",
    ),
    "zero more rounds": (["run", "nowhere", "--rounds", "0"], "--rounds 0"),
    "no such run": (["status", "nowhere"], "not a run directory"),
    "no such recipe": (["check", "nowhere.yaml"], "no such recipe"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_option(kind, refused, tmp_path):
    arguments, match = OPTIONS[kind]
    scored_frame(0, 6, 4).to_parquet(tmp_path / "s.parquet")
    names = {
        "S": tmp_path / "s.parquet",
        "O": tmp_path / "out.parquet",
        "nowhere": tmp_path / "nowhere",
    }
    refused(*(names.get(a, a) for a in arguments), match=match)
    assert not (tmp_path / "out.parquet").exists()


def test_duplicated_ids_are_named(refused, tmp_path):
    frame = scored_frame(0, 6, 4)
    frame.assign(response_id=["y0", "y0", *frame["response_id"][2:]]).to_parquet(
        tmp_path / "s.parquet"
    )
    out = tmp_path / "out.parquet"
    refused(
        "data", "relabel", tmp_path / "s.parquet", "--reward", "r", "-o", out, match="duplicated"
    )
    prompts = pd.DataFrame(
        {"prompt_id": ["a", "a", "b"], "prompt": ["x", "y", "z"], "split": "fit"}
    )
    prompts.to_parquet(tmp_path / "p.parquet")
    refused(
        "data",
        "sample",
        tmp_path / "p.parquet",
        "-o",
        out,
        "--model",
        "quickstart",
        match="duplicated prompt_id: 'a'",
    )


# Scorers.

SCORERS = {
    "wrong count": ("def f(p, r): return [0.0]", "for 3 responses"),
    "a table of scores": ("def f(p, r): return [[0.0, 1.0]] * len(r)", "for 3 responses"),
    "None": ("def f(p, r): return None", "scorer"),
    "None among numbers": ("def f(p, r): return [1.0, None, 2.0]", "scorer"),
    "words": ("def f(p, r): return ['good'] * len(r)", "did not return numbers"),
    "NaN": ("def f(p, r): return [float('nan')] * len(r)", "must be finite"),
    "infinity": ("def f(p, r): return [1.0, float('-inf'), 0.0]", "must be finite"),
    "raises": ("def f(p, r): raise KeyError('x')", "raised KeyError"),
    "raises on two lines": ("def f(p, r): raise ValueError('one\\ntwo')", "raised ValueError"),
    "exits": ("def f(p, r): raise SystemExit(0)", "raised SystemExit"),
    "wrong arguments": ("def f(p): return [0.0] * len(p)", "raised TypeError"),
    "no function": ("g = 1", "has no function f"),
    "not a function": ("f = 1", "has no function f"),
    "broken file": ("def f(:", "cannot be imported (SyntaxError"),
    "import that fails": (
        "import no_such_module_at_all",
        "cannot be imported (ModuleNotFoundError",
    ),
    "no file": (None, "no such file"),
}


@pytest.mark.parametrize("kind", SCORERS)
def test_python_scorer(kind, refused, answers, tmp_path):
    code, match = SCORERS[kind]
    if code is not None:
        (tmp_path / "s.py").write_text(code + "\n")
    scorer = yaml.safe_dump(
        {"type": "python", "target": f"{tmp_path / 's.py'}:f"}, default_flow_style=True
    )
    line = refused(
        "data",
        "score",
        answers,
        "-o",
        tmp_path / "out.parquet",
        "--name",
        "n",
        "--scorer",
        scorer,
        match=match,
    )
    assert "s.py" in line or "must be finite" in line
    assert not (tmp_path / "out.parquet").exists()


SCORER_SETTINGS = {
    "unknown type": ("{type: pyton}", "--scorer"),
    "not a mapping": ("[1]", "--scorer"),
    "broken YAML": ("{type", "--scorer"),
    "unknown key": ("{type: python, target: 'a:b', negat: true}", "negat"),
    "target without a function": ("{type: python, target: foo}", "write file.py:function"),
    "no such module": (
        "{type: python, target: 'no_such_module:f'}",
        "module no_such_module cannot be imported",
    ),
    "table that is not there": ("{type: column, file: none.csv, column: x}", "no such file"),
}


@pytest.mark.parametrize("kind", SCORER_SETTINGS)
def test_scorer_settings(kind, refused, answers, tmp_path):
    scorer, match = SCORER_SETTINGS[kind]
    refused(
        "data",
        "score",
        answers,
        "-o",
        tmp_path / "out.parquet",
        "--name",
        "n",
        "--scorer",
        scorer,
        match=match,
    )


def test_column_scorer_without_the_text_and_reserved_column(refused, answers, tmp_path):
    pd.DataFrame({"prompt": ["q"], "response": ["1"], "x": [1.0]}).to_csv(tmp_path / "known.csv")
    out, scorer = (
        tmp_path / "out.parquet",
        f"{{type: column, file: {tmp_path / 'known.csv'}, column: x}}",
    )
    refused(
        "data",
        "score",
        answers,
        "-o",
        out,
        "--name",
        "n",
        "--scorer",
        scorer,
        match="no row for 2 of 3 responses",
    )
    refused(
        "data",
        "score",
        answers,
        "-o",
        out,
        "--name",
        "response",
        "--scorer",
        scorer,
        match="reserved column name",
    )
