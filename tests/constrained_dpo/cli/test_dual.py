"""`cdpo dual`: what it prints, as text and as JSON, of plain and of odd tables."""

import json

import pytest
from typer.testing import CliRunner

from constrained_dpo.cli import dual as dual_cli
from constrained_dpo.dual.feasibility import INFEASIBLE, NO_EVIDENCE
from data_prep.errors import UserError
from tests.helpers.tables import scored_frame


def invoke(*arguments) -> tuple[str, str]:
    result = CliRunner().invoke(dual_cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def solve(path, *arguments, reward="r") -> tuple[dict, str]:
    out, err = invoke("solve", path, "--reward", reward, *arguments, "--json")
    return json.loads(out), err


@pytest.mark.parametrize("beta", [0.01, 0.1, 1, 10])
@pytest.mark.parametrize(
    "case",
    ["plain", "one prompt", "one response", "utility is the reward", "two identical utilities"],
)
def test_odd_tables_get_a_sensible_answer_or_a_clear_message(case, beta, tmp_path):
    prompts, responses = (
        (1, 50) if case == "one prompt" else (50, 1) if case == "one response" else (40, 32)
    )
    frame = scored_frame(0, prompts, responses, ("r", "g", "h"))
    if case == "utility is the reward":
        frame["g"] = frame["r"]
    if case == "two identical utilities":
        frame["h"] = frame["g"]
    frame.assign(source="reference").to_parquet(path := tmp_path / "t.parquet")
    constraints = [
        "--constraint",
        "g=0.5",
        *(["--constraint", "h=0.5"] if case == "two identical utilities" else []),
    ]
    resampled = [] if case == "one response" else ["--bootstrap", 20]
    solution, err = solve(path, *constraints, "--beta", beta, *resampled)
    if case == "one response":
        assert solution["at_bound"] == ["g"] and solution["ess"] == 1.0
        assert solution["feasibility"]["verdict"] == NO_EVIDENCE
        assert "not enough evidence" in err and len(err.strip().splitlines()) == 1
        return
    assert err == "" and solution["at_bound"] == [] and solution["feasibility"] is None
    reached, level = solution["utilities"]["g"], frame.groupby("prompt_id")["g"].mean().mean() + 0.5
    met = reached == pytest.approx(level, abs=1e-8)
    assert met or (solution["lambda"]["g"] == 0 and reached > level)
    for name, (low, high) in solution["lambda_ci"].items():
        assert low <= solution["lambda"][name] <= high or case == "one prompt"
    if case == "utility is the reward" and beta < 1:
        assert solution["lambda"]["g"] == 0.0
    if case == "two identical utilities":
        single, _ = solve(path, "--constraint", "g=0.5", "--beta", beta)
        assert sum(solution["lambda"].values()) == pytest.approx(single["lambda"]["g"], abs=1e-6)
        assert solution["dual_value"] == pytest.approx(single["dual_value"], abs=1e-9)


def test_solve_says_what_cannot_be_met(tmp_path):
    frame = scored_frame(0, 100, 64, ("r", "g", "h")).assign(g=lambda f: f["g"].clip(-1, 1).round())
    frame.to_parquet(path := tmp_path / "t.parquet")
    levels = ["--constraint", "g=1.5", "--threshold", "h=0.2", "--beta", "0.5"]
    for ceiling, verdict in (([], NO_EVIDENCE), (["--ceiling", "g=1"], INFEASIBLE)):
        solution, err = solve(path, *levels, *ceiling)
        feasibility = solution["feasibility"]
        assert solution["at_bound"] == feasibility["constraints"] == ["g"]
        assert feasibility["verdict"] == verdict
        first, second = err.strip().splitlines()
        assert "taken as the reference policy's samples" in first and verdict in second
    options = ["--reward", "r", "--constraint", "g=0.3", "--beta", "0.5", "--max-lambda", "0.01"]
    _, err = invoke("solve", path, *options)
    assert "feasible" in err and "raise the bound" in err


def test_thresholds_stand_beside_margins(tmp_path):
    scored_frame(0, 60, 16, ("r", "g", "h")).to_parquet(path := tmp_path / "t.parquet")
    levels = ["--constraint", "g=0.3", "--threshold", "h=0.2", "--beta", "0.5", "--stability"]
    solution, _ = solve(path, *levels)
    assert solution["utilities"]["h"] == pytest.approx(0.2) and solution["feasibility"] is None
    parts = solution["stability"]
    assert {row["constraint"] for row in parts} == {"g", "h"} and parts[-1]["sd"] is None


def test_bootstrap_is_seeded_and_printed(tmp_path):
    scored_frame(0, 60, 16).assign(source="reference").to_parquet(tmp_path / "t.parquet")
    options = ["--constraint", "g=0.3", "--beta", "0.5", "--bootstrap", 50]
    one, two, other = (solve(tmp_path / "t.parquet", *options, "--seed", s)[0] for s in (1, 1, 2))
    assert (
        one == two
        and one["lambda_ci"] != other["lambda_ci"]
        and one["bootstrap"] == {"replicates": 50, "seed": 1, "at_bound": 0.0}
    )
    low, high = one["lambda_ci"]["g"]
    out, _ = invoke(
        "solve", tmp_path / "t.parquet", "--reward", "r", *options, "--seed", 1, "--stability"
    )
    assert f"[{low:.4g}, {high:.4g}]" in out and "λ*(g) on random parts" in out


def test_sweep_command_prints_json_and_draws(tmp_path):
    scored_frame(0, 60, 16, ("r", "g", "h")).assign(source="reference").to_parquet(
        tmp_path / "t.parquet"
    )
    options = [
        "sweep",
        tmp_path / "t.parquet",
        "--reward",
        "r",
        "--constraint",
        "g=0:3:4",
        "--threshold",
        "h=0.1,0.2",
        "--beta",
        "0.5",
    ]
    out, err = invoke(*options, "--plot", tmp_path / "curve.png", "--json")
    points = json.loads(out)
    assert [p["levels"] for p in points] == [
        {"g": g, "h": h} for g in (0.0, 1.0, 2.0, 3.0) for h in (0.1, 0.2)
    ]
    single, _ = solve(
        tmp_path / "t.parquet", "--constraint", "g=1", "--threshold", "h=0.2", "--beta", "0.5"
    )
    assert points[3]["lambda"] == pytest.approx(single["lambda"], abs=1e-9) and points[3][
        "kl"
    ] == pytest.approx(single["kl"])
    assert "in 4 of 8 settings" in err and (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    rows = [line for line in invoke(*options)[0].splitlines() if line.startswith("│")]
    assert len(rows) == len(points) and sum("!" in row for row in rows) == 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["solve", "T", "--beta", "1", "--bootstrap", "1"], "at least 2 replicates"),
        (["solve", "T", "--beta", "1", "--seed", "-1"], "--seed -1"),
        (
            ["solve", "T", "--beta", "1", "--constraint", "g=1", "--threshold", "g=1"],
            "g is used twice",
        ),
        (["sweep", "T", "--beta", "1"], "nothing to sweep"),
        (["sweep", "T", "--beta", "1", "--constraint", "g=0:1"], "NAME=LOW:HIGH:NUMBER"),
        (["sweep", "T", "--beta", "1", "--constraint", "g=0:1:0"], "NAME=LOW:HIGH:NUMBER"),
        (["sweep", "T", "--beta", "1", "--constraint", "g=0,nan"], "finite number"),
        (
            ["sweep", "T", "--beta", "1", "--constraint", "g=0:1:200", "--constraint", "h=0:1:200"],
            "40000 combinations",
        ),
    ],
)
def test_mistakes_in_options(arguments, match, tmp_path):
    scored_frame(0, 6, 4, ("r", "g", "h")).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=match):
        invoke(*[tmp_path / "t.parquet" if a == "T" else a for a in arguments], "--reward", "r")
