"""The commands as a user types them: real processes, exit codes, one-line errors, no torch where
none is needed."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.one_shot import solve_one_shot
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


@pytest.mark.parametrize("command", ["help", "status", "solve", "relabel"])
def test_light_commands_never_import_torch(command, scores, tmp_path):
    arguments = {
        "help": ["--help"],
        "status": ["status", tmp_path / "run"],
        "solve": [
            "dual",
            "solve",
            scores,
            "--reward",
            "r",
            "--constraint",
            "g=0.2",
            "--beta",
            "0.5",
            "--json",
        ],
        "relabel": [
            "data",
            "relabel",
            scores,
            "--reward",
            "r",
            "--lambda",
            "g=0.5",
            "-o",
            tmp_path / "pairs.parquet",
        ],
    }[command]
    if command == "status":
        cdpo("init", QUICKSTART, tmp_path / "run", check=0)
    code = (
        "import sys\nfrom constrained_dpo.cli.main import app\n"
        f"try: app({[str(a) for a in arguments]!r})\nexcept SystemExit as stop: assert not "
        "stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes'} & "
        "set(sys.modules)\n"
        "assert not heavy, f'imported {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_dual_solve_prints_the_solvers_answer(scores):
    result = cdpo(
        "dual",
        "solve",
        scores,
        "--reward",
        "r",
        "--constraint",
        "g=0.2",
        "--beta",
        "0.5",
        "--json",
        check=0,
    )
    found = json.loads(result.stdout)
    problem = ConstrainedProblem("r", 0.5, (Constraint("g", margin=0.2),))
    expected = solve_one_shot(ScoreTable.from_frame(pd.read_parquet(scores), problem), problem)
    assert (
        found["lambda"] == expected.lambda_.to_dict() and found["dual_value"] == expected.dual_value
    )
    assert set(found) >= {"lambda", "dual_value", "ess", "reward", "utilities"}
    words = cdpo(
        "dual", "solve", scores, "--reward", "r", "--constraint", "g=0.2", "--beta", "0.5", check=0
    ).stdout
    assert f"λ*(g) = {expected.lambda_['g']:.6g}" in words


def test_relabel_writes_the_same_pairs_from_every_format_and_inspect_reads_them(scores, tmp_path):
    frame = pd.read_parquet(scores).assign(prompt="ask", response="say")
    frame.to_csv(tmp_path / "s.csv", index=False)
    frame.to_json(tmp_path / "s.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "s.parquet")
    outputs = []
    for name in ("s.csv", "s.jsonl", "s.parquet"):
        out = tmp_path / f"{name}.pairs.parquet"
        options = [
            "--reward",
            "r",
            "--lambda",
            "g=0.5",
            "--labels",
            "bernoulli",
            "--pairs-per-prompt",
            4,
            "--text",
            "--seed",
            3,
            "-o",
            out,
        ]
        cdpo("data", "relabel", tmp_path / name, *options, check=0)
        outputs.append(pd.read_parquet(out))
    assert len(outputs[0]) == 200 and (outputs[0]["chosen"] == "say").all()
    for other in outputs[1:]:
        pd.testing.assert_frame_equal(
            outputs[0][["chosen_id", "rejected_id"]], other[["chosen_id", "rejected_id"]]
        )
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


def test_prompts_sample_score_relabel_from_the_shell(tmp_path):
    """The data app end to end with the embedded world's policy."""
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{a} open {o}"}) + "\n"
            for a in ("kid", "boss")
            for o in ("safe", "dog")
        )
    )
    prompts, drawn, scored, pairs = (
        tmp_path / f"{n}.parquet" for n in ("prompts", "drawn", "scored", "pairs")
    )
    cdpo("data", "prompts", tmp_path / "p.jsonl", "-o", prompts, "--test", "0.5", "--num-dual", 1)
    frame = pd.read_json(tmp_path / "p.jsonl", lines=True).assign(
        prompt_id=list("abcd"), split="fit"
    )
    frame.to_parquet(prompts)
    options = [
        "--model",
        "quickstart",
        "--dtype",
        "float32",
        "--max-new-tokens",
        3,
        "-k",
        4,
        "--json",
    ]
    assert (
        json.loads(cdpo("data", "sample", prompts, "-o", drawn, *options, check=0).stdout)[
            "responses"
        ]
        == 16
    )
    for name, source in (("helpful", drawn), ("harmless", scored)):
        scorer = f"{{type: python, target: 'data_prep.quickstart:{name}'}}"
        summary = json.loads(
            cdpo(
                "data",
                "score",
                source,
                "-o",
                scored,
                "--name",
                name,
                "--scorer",
                scorer,
                "--json",
                check=0,
            ).stdout
        )
        assert summary["rows"] == 16 and summary["mean"] == pytest.approx(
            pd.read_parquet(scored)[name].mean()
        )
    relabelled = cdpo(
        "data",
        "relabel",
        scored,
        "--reward",
        "helpful",
        "--lambda",
        "harmless=0.5",
        "-o",
        pairs,
        "--json",
        check=0,
    )
    assert json.loads(relabelled.stdout)["pairs"] == len(pd.read_parquet(pairs)) == 4 * 6


def test_init_and_prompts_answer_in_json(tmp_path):
    made = json.loads(cdpo("init", QUICKSTART, tmp_path / "run", "--json", check=0).stdout)
    assert (
        made["name"] == "quickstart"
        and made["recipe_hash"]
        == json.loads((tmp_path / "run" / "state.json").read_text())["recipe_hash"]
    )
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"prompt {i % 40}"}) + "\n" for i in range(50))
    )
    split = cdpo(
        "data",
        "prompts",
        tmp_path / "p.jsonl",
        "-o",
        tmp_path / "p.parquet",
        "--num-dual",
        5,
        "--json",
        check=0,
    )
    found = json.loads(split.stdout)
    assert (
        sum(found["prompts"].values()) == 40
        and found["prompts"]["dual"] == 5
        and found["left_out"]["duplicates"] == 10
    )


def test_a_finished_run_says_so_and_rounds_are_chosen_by_name(run):
    done = json.loads(cdpo("run", run.path, "--until-converged", "--json", check=0).stdout)
    assert done["round"] == 1 and done["stopped"] is None
    content = json.loads(cdpo("status", run.path, "--json", check=0).stdout)
    assert content["best_dual"] in (0, 1) and content["certificate"].startswith(
        "certificate (dual prompts): "
    )
    assert {"lagrangian_gap", "residual", "ess", "step"} <= set(content["rounds"][0])
    satisfied = content["best"] is not None
    report = cdpo("report", run.path, "--round", "best", check=0 if satisfied else 2)
    assert satisfied or "no round of 2 is satisfied on the dual prompts at 95 %" in report.stderr
    assert "--round best-dual: round" in cdpo("status", run.path, check=0).stdout
