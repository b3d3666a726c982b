"""The commands as a user types them: real processes, exit codes, one-line errors, no torch where
none is needed."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.one_shot import first_multipliers
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART
from tests.helpers.tables import scored_frame


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.parquet"
    scored_frame(0, 50, 20).assign(source="reference").to_parquet(path)
    return path


IMPORTS = """
import sys
from constrained_dpo.cli.main import app
for words in {commands!r}:
    try:
        app(words)
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
    heavy = {libraries!r} & set(sys.modules)
    assert not heavy, f"{{words}} imported {{heavy}}"
"""


def test_light_commands_never_import_torch(scores, tmp_path):
    """One after the other in a new process."""
    cdpo("init", QUICKSTART, tmp_path / "run", check=0)
    problem = [scores, "--reward", "r"]
    commands = [
        ["--help"],
        ["status", tmp_path / "run"],
        ["dual", "solve", *problem, "--constraint", "g=0.2", "--beta", "0.5", "--json"],
        ["data", "relabel", *problem, "--lambda", "g=0.5", "-o", tmp_path / "pairs.parquet"],
    ]
    libraries = {"torch", "transformers", "trl", "peft", "datasets", "bitsandbytes"}
    commands = [list(map(str, words)) for words in commands]
    code = IMPORTS.format(commands=commands, libraries=libraries)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_dual_solve_prints_the_solvers_answer(scores):
    words = ["dual", "solve", scores, "--reward", "r", "--constraint", "g=0.2", "--beta", "0.5"]
    answer = json.loads(cdpo(*words, "--json", check=0).stdout)
    problem = ConstrainedProblem("r", 0.5, (Constraint("g", margin=0.2),))
    table = ScoreTable.from_frame(pd.read_parquet(scores), problem)
    expected = first_multipliers(table, problem)
    assert answer["lambda"] == expected.lambda_.to_dict()
    assert answer["lambda_sampled"] == expected.plain.lambda_.to_dict() != answer["lambda"]
    assert answer["dual_value"] == expected.plain.dual_value
    assert set(answer) >= {"lambda", "dual_value", "ess", "reward", "utilities"}
    assert f"λ*(g) = {expected.lambda_['g']:.6g}" in cdpo(*words, check=0).stdout


def test_relabel_writes_the_same_pairs_from_every_format_and_inspect_reads_them(scores, tmp_path):
    frame = pd.read_parquet(scores).assign(prompt="ask", response="say")
    frame.to_csv(tmp_path / "s.csv", index=False)
    frame.to_json(tmp_path / "s.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "s.parquet")
    outputs, words = [], ["--reward", "r", "--lambda", "g=0.5", "--labels", "bernoulli", "--text"]
    for name in ("s.csv", "s.jsonl", "s.parquet"):
        out = tmp_path / f"{name}.pairs.parquet"
        options = [*words, "--pairs-per-prompt", 4, "--seed", 3, "-o", out]
        cdpo("data", "relabel", tmp_path / name, *options, check=0)
        outputs.append(pd.read_parquet(out))
    assert len(outputs[0]) == 200 and (outputs[0]["chosen"] == "say").all()
    ids = ["chosen_id", "rejected_id"]
    for other in outputs[1:]:
        pd.testing.assert_frame_equal(outputs[0][ids], other[ids])
        np.testing.assert_allclose(outputs[0]["prob"], other["prob"], atol=1e-6)
    facts = json.loads(cdpo("data", "inspect", out, "--json", check=0).stdout)
    assert facts["rows"] == 200 and facts["columns"]["target"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["status", "nowhere"], "not a run directory"),
        (["round", "nowhere"], "not a run directory"),
        (["init", "nowhere.yaml", "x"], "no such recipe file"),
        (["init", QUICKSTART, "x", "-s", "objective.beta=-1"], "objective.beta"),
        (["dual", "solve", "none.csv", "--reward", "r", "--beta", "1"], "no such file"),
        (
            ["dual", "solve", "SCORES", "--reward", "r", "--constraint", "h=1", "--beta", "1"],
            "missing column h",
        ),
        (
            ["dual", "solve", "SCORES", "--reward", "r", "--constraint", "g=one", "--beta", "1"],
            "write NAME=NUMBER",
        ),
        (["dual", "solve", "SCORES", "--reward", "r", "--beta", "0"], "beta is 0"),
        (
            ["data", "relabel", "SCORES", "--reward", "r", "--lambda", "g=-1", "-o", "o"],
            "lambda of g is -1",
        ),
        (
            ["data", "relabel", "SCORES", "--reward", "r", "--labels", "hard", "-o", "o"],
            "not one of soft",
        ),
        (
            ["data", "score", "SCORES", "-o", "o", "--name", "response", "--scorer", "{}"],
            "reserved column name",
        ),
        (
            ["data", "score", "SCORES", "-o", "o", "--name", "n", "--scorer", "{type: pyton}"],
            "--scorer",
        ),
        (["data", "prompts", "none.jsonl", "-o", "o"], "no such file"),
        (["data", "prompts", "none.jsonl", "-o", "o", "--format", "txt"], "format"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments, match, scores, tmp_path):
    arguments = [
        str(tmp_path / a) if a in ("nowhere", "x", "o") else str(scores) if a == "SCORES" else a
        for a in arguments
    ]
    result = cdpo(*arguments, check=2)
    assert match in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_dual_solve_refuses_samples_of_another_policy(tmp_path):
    scored_frame(0, 5, 4).assign(source="round:1").to_parquet(tmp_path / "s.parquet")
    result = cdpo("dual", "solve", tmp_path / "s.parquet", "--reward", "r", "--beta", "1", check=2)
    assert "not the reference policy's" in result.stderr


def told(*words) -> dict:
    """What a command says in JSON."""
    return json.loads(cdpo(*words, "--json", check=0).stdout)


def test_prompts_sample_score_relabel_from_the_shell(tmp_path):
    """The data app end to end with the embedded world's policy."""
    requests = [f"{who} open {thing}" for who in ("kid", "boss") for thing in ("safe", "dog")]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in requests))
    prompts, drawn, scored, pairs = (
        tmp_path / f"{n}.parquet" for n in ("prompts", "drawn", "scored", "pairs")
    )
    cdpo("data", "prompts", file, "-o", prompts, "--test", "0.5", "--num-dual", 1, check=0)
    model = ["--model", "quickstart", "--dtype", "float32", "--max-new-tokens", 3, "-k", 4]
    assert told("data", "sample", prompts, "-o", drawn, *model)["responses"] == 16
    for name, source in (("helpful", drawn), ("harmless", scored)):
        scorer = f"{{type: python, target: 'data_prep.quickstart:{name}'}}"
        options = ["-o", scored, "--name", name, "--scorer", scorer]
        summary = told("data", "score", source, *options)
        assert summary["rows"] == 16
        assert summary["mean"] == pytest.approx(pd.read_parquet(scored)[name].mean())
    options = ["--reward", "helpful", "--lambda", "harmless=0.5", "-o", pairs]
    assert told("data", "relabel", scored, *options)["pairs"] == len(pd.read_parquet(pairs)) == 24


def test_init_and_prompts_answer_in_json(tmp_path):
    made = told("init", QUICKSTART, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert made["name"] == "quickstart" and made["recipe_hash"] == state["recipe_hash"]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {i % 40}"}) + "\n" for i in range(50)))
    split = told("data", "prompts", file, "-o", tmp_path / "p.parquet", "--num-dual", 5)
    assert sum(split["prompts"].values()) == 40 and split["prompts"]["dual"] == 5
    assert split["left_out"]["duplicates"] == 10
