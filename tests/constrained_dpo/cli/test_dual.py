"""`cdpo dual` and what says how far its λ* can be trusted: bootstrap, stability, sweep."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from constrained_dpo.cli import dual as dual_cli
from constrained_dpo.dual.feasibility import INFEASIBLE, NO_EVIDENCE
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.sensitivity import bootstrap_multipliers, stability, sweep
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from tests.helpers.tables import scored_frame


def test_bootstrap_interval_covers_and_its_replicates_are_resampled_tables():
    """Prompts drawn from a population of 4000: the interval of λ* covers the population's λ*."""
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(4000, 1))
    reward = rng.normal(size=(4000, 6)) + shift
    utilities = (-0.6 * reward + rng.normal(size=(4000, 6)) + 0.5 * shift)[None]
    problem = ConstrainedProblem("r", 0.5, (Constraint("g", margin=0.3),))
    population = ScoreTable.from_arrays(reward, utilities)
    truth, covered, replications = solve_one_shot(population, problem).lambda_["g"], 0, 100
    for _ in range(replications):
        table = population.take(rng.integers(0, 4000, 80))
        solution = solve_one_shot(table, problem)
        found = bootstrap_multipliers(table, problem, solution, 60, rng)
        covered += found.interval.loc["g", "low"] <= truth <= found.interval.loc["g", "high"]
    assert (
        0.88 <= covered / replications <= 0.99
    )  # 95 % ± 3 standard errors of 100 replications; percentile intervals run a little low
    # One replicate by hand: the solver on the table with the prompts that were drawn.
    draws = np.random.default_rng(7).multinomial(80, np.full(80, 1 / 80))
    by_hand = solve_one_shot(table.take(np.repeat(np.arange(80), draws)), problem).lambda_["g"]
    one = bootstrap_multipliers(table, problem, solution, 3, np.random.default_rng(7)).draws["g"]
    assert one[0] == pytest.approx(by_hand, abs=1e-6) and one.nunique() == 3


def test_stability_shows_the_bias_of_few_responses_and_the_noise_of_few_prompts():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(800, 64))
    table = ScoreTable.from_arrays(reward, (-0.6 * reward + 0.8 * rng.normal(size=(800, 64)))[None])
    problem = ConstrainedProblem("r", 0.2, (Constraint("g", margin=0.4),))
    parts = stability(table, problem, rng).set_index(["num_prompts", "num_responses"])
    assert len(parts) == 16 and (parts["repeats"].drop((800, 64)) == 10).all()
    whole = solve_one_shot(table, problem).lambda_["g"]
    assert parts.loc[(800, 64), "mean"] == whole and np.isnan(parts.loc[(800, 64), "sd"])
    assert parts.loc[(100, 64), "sd"] > parts.loc[(400, 64), "sd"]
    by_responses = [abs(parts.loc[(800, k), "mean"] - whole) for k in (8, 16, 32)]
    assert by_responses[0] > by_responses[1] > by_responses[2] > 0


def test_sweep_equals_one_solve_per_setting_and_trades_reward_for_utility():
    frame = scored_frame(1, 200, 16, ("r", "g", "h"))
    problem = ConstrainedProblem(
        "r", 0.3, (Constraint("g", margin=0.0), Constraint("h", threshold=0.1))
    )
    table = ScoreTable.from_frame(frame, problem)
    points = list(sweep(table, problem, {"g": [0.0, 0.3, 0.6], "h": [0.1, 0.2]}))
    assert [tuple(p.bounds) for p in points] == [
        (g, h) for g in (0.0, 0.3, 0.6) for h in (0.1, 0.2)
    ]
    for point in points:
        setting = ConstrainedProblem(
            "r",
            0.3,
            (
                Constraint("g", margin=point.bounds["g"]),
                Constraint("h", threshold=point.bounds["h"]),
            ),
        )
        pd.testing.assert_series_equal(
            point.solution.lambda_, solve_one_shot(table, setting).lambda_, atol=1e-9
        )
    rewards = [p.solution.reward - 0.3 * p.solution.kl for p in points[::2]]
    assert rewards[0] > rewards[1] > rewards[2]


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
    frame.assign(source="reference").to_parquet(tmp_path / "t.parquet")
    constraints = [
        "--constraint",
        "g=0.5",
        *(["--constraint", "h=0.5"] if case == "two identical utilities" else []),
    ]
    found, err = solve(tmp_path / "t.parquet", *constraints, "--beta", beta, "--bootstrap", 20)
    if case == "one response":
        assert (
            found["at_bound"] == ["g"]
            and found["feasibility"]["verdict"] == NO_EVIDENCE
            and found["ess"] == 1.0
        )
        assert "not enough evidence" in err and len(err.strip().splitlines()) == 1
        return
    assert err == "" and found["at_bound"] == [] and found["feasibility"] is None
    reached, level = found["utilities"]["g"], frame.groupby("prompt_id")["g"].mean().mean() + 0.5
    assert reached == pytest.approx(level, abs=1e-8) or (
        found["lambda"]["g"] == 0 and reached > level
    )
    assert all(
        low <= value <= high or case == "one prompt"
        for (low, high), value in zip(
            found["lambda_ci"].values(), found["lambda"].values(), strict=True
        )
    )
    if case == "utility is the reward" and beta < 1:
        assert found["lambda"]["g"] == 0.0
    if case == "two identical utilities":
        single, _ = solve(tmp_path / "t.parquet", "--constraint", "g=0.5", "--beta", beta)
        assert sum(found["lambda"].values()) == pytest.approx(single["lambda"]["g"], abs=1e-6)
        assert found["dual_value"] == pytest.approx(single["dual_value"], abs=1e-9)


def test_solve_says_what_cannot_be_met_and_thresholds_stand_beside_margins(tmp_path):
    frame = scored_frame(0, 100, 64, ("r", "g", "h")).assign(g=lambda f: f["g"].clip(-1, 1).round())
    frame.to_parquet(tmp_path / "t.parquet")
    found, err = solve(
        tmp_path / "t.parquet", "--constraint", "g=1.5", "--threshold", "h=0.2", "--beta", "0.5"
    )
    assert (
        found["at_bound"] == ["g"]
        and found["feasibility"]["verdict"] == INFEASIBLE
        and found["feasibility"]["constraints"] == ["g"]
    )
    lines = err.strip().splitlines()
    assert (
        "taken as the reference policy's samples" in lines[0]
        and "infeasible" in lines[1]
        and len(lines) == 2
    )
    found, _ = solve(
        tmp_path / "t.parquet",
        "--constraint",
        "g=0.3",
        "--threshold",
        "h=0.2",
        "--beta",
        "0.5",
        "--stability",
    )
    assert found["utilities"]["h"] == pytest.approx(0.2) and found["feasibility"] is None
    assert {row["constraint"] for row in found["stability"]} == {"g", "h"} and found["stability"][
        -1
    ]["sd"] is None
    _, err = invoke(
        "solve",
        tmp_path / "t.parquet",
        "--reward",
        "r",
        "--constraint",
        "g=0.3",
        "--beta",
        "0.5",
        "--max-lambda",
        "0.01",
    )
    assert "feasible" in err and "raise the bound" in err


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
    out, _ = invoke(*options)
    assert len(out.splitlines()) == 9 and out.count("!") >= 4


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
