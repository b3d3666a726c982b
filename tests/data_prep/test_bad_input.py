"""Tables of scores and options with a mistake, kind by kind, through the real command line: one
line that says what, where and what to do; exit 2; nothing written.

Recipes, prompt files and scorers: test_bad_recipes.py, test_bad_prompt_files.py,
test_bad_scorers.py.
"""

import numpy as np
import pandas as pd
import pytest

from tests.helpers.tables import scored_frame

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


COMMANDS = {
    "solve": ["dual", "solve", "S", "--reward", "r", "--constraint", "g=0.2", "--beta", "1"],
    "relabel": ["data", "relabel", "S", "--reward", "r", "--lambda", "g=0.5", "-o", "O"],
}


@pytest.fixture
def refuse(refused, tmp_path):
    """Asserts that a command is refused and writes no table. S stands for the table of scores, O
    for the output, nowhere for a path where nothing is."""
    output = tmp_path / "out.parquet"

    def run(words: list[str], match: str, scores="s.parquet") -> None:
        paths = {"S": tmp_path / scores, "O": output, "nowhere": tmp_path / "nowhere"}
        refused(*(paths.get(word, word) for word in words), match=match)
        assert not output.exists()

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", SCORES)
def test_a_table_of_scores_is_refused(kind, command, refuse, tmp_path):
    changes, match = SCORES[kind]
    if kind == "word as score":  # a parquet column has one type
        name = "s.jsonl"
        bad_scores(changes).to_json(tmp_path / name, orient="records", lines=True)
    else:
        name = "s.parquet"
        bad_scores(changes).to_parquet(tmp_path / name)
    refuse(COMMANDS[command], match, scores=name)


RELABEL = ["data", "relabel", "S", "--reward", "r", "-o", "O"]
SOLVE = ["dual", "solve", "S", "--reward", "r"]
OPTIONS = {
    "negative lambda": ([*RELABEL, "--lambda", "g=-1"], "lambda of g is -1"),
    "lambda nan": ([*RELABEL, "--lambda", "g=nan"], "lambda of g is nan"),
    "lambda twice": ([*RELABEL, "--lambda", "g=1", "--lambda", "g=2"], "each name once"),
    "unknown labels": ([*RELABEL, "--labels", "hard"], "not one of soft"),
    "zero pairs": ([*RELABEL, "--pairs-per-prompt", "0"], "a number ≥ 1, or all"),
    "text without texts": ([*RELABEL, "--text"], "missing column"),
    "another format's name": (["data", "prompts", "S", "-o", "p.csv"], "p.csv: is written as parq"),
    "a packed name": (["data", "prompts", "S", "-o", "p.parquet.gz"], "name it .parquet"),
    "margin a word": ([*SOLVE, "--constraint", "g=one", "--beta", "1"], "write NAME=NUMBER"),
    "margin nan": ([*SOLVE, "--constraint", "g=nan", "--beta", "1"], "g"),
    "beta negative": ([*SOLVE, "--beta", "-1"], "beta is -1"),
    "beta infinite": ([*SOLVE, "--beta", "inf"], "beta is inf"),
    "utility is the reward": ([*SOLVE, "--constraint", "r=1", "--beta", "1"], "r is used twice"),
    "max-lambda 0": ([*SOLVE, "--beta", "1", "--max-lambda", "0"], "--max-lambda"),
    "zero more rounds": (["run", "nowhere", "--rounds", "0"], "--rounds 0"),
    "no such run": (["status", "nowhere"], "not a run directory"),
    "no such recipe": (["check", "nowhere.yaml"], "no such recipe"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_is_refused(kind, refuse, tmp_path):
    arguments, match = OPTIONS[kind]
    scored_frame(0, 6, 4).to_parquet(tmp_path / "s.parquet")
    refuse(arguments, match)


def test_duplicated_ids_are_named(refuse, tmp_path):
    frame = scored_frame(0, 6, 4)
    ids = ["y0", "y0", *frame["response_id"][2:]]
    frame.assign(response_id=ids).to_parquet(tmp_path / "s.parquet")
    refuse(RELABEL, "duplicated")
    prompts = {"prompt_id": ["a", "a", "b"], "prompt": ["x", "y", "z"], "split": "fit"}
    pd.DataFrame(prompts).to_parquet(tmp_path / "p.parquet")
    sample = ["data", "sample", "S", "-o", "O", "--model", "quickstart"]
    refuse(sample, "duplicated prompt_id: 'a'", scores="p.parquet")
