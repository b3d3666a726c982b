"""`cdpo compare` over real runs (exact maximizer as the learner): its numbers against the files,
who is not mixed, the page."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.intervals import t_interval
from constrained_dpo.experiments.compare import points, read_groups, why_not_comparable
from constrained_dpo.experiments.rows import identity
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.methods import METHODS
from constrained_dpo.report.contents import signed
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import read_optimum, read_records
from data_prep.readers.tables import read_parquet, write_parquet
from tests.helpers.cli import cdpo
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world


def world(margin: float) -> TabularWorld:
    return random_world(3, 2, prompts=20, responses=20, margin=margin)


def ends_world(name: str) -> TabularWorld:
    """The same world with one utility as the reward and the reward as a constraint."""
    whole = world(0.2)
    values = {"r": whole.reward, **whole.utilities}
    others = [n for n in values if n != name]
    problem = ConstrainedProblem(
        name, 0.5, tuple(Constraint(n, margin=0.0 if n == "r" else 0.2) for n in others)
    )
    return TabularWorld(problem, whole.ref_logp, values[name], {n: values[n] for n in others})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """CAID at two margins, the first with two seeds; MoCAN at one; DPO on a utility alone. Two
    rounds of the first, one of the others."""
    root = tmp_path_factory.mktemp("runs")
    ends = ["dual.method=fixed", "dual.init=zeros", "seed=0"]
    plans = {f"caid-{s}": (world(0.2), [*METHODS["caid"], f"seed={s}"]) for s in range(2)} | {
        "caid-wide": (world(0.5), [*METHODS["caid"], "seed=0"]),
        "mocan": (world(0.2), [*METHODS["mocan"], "seed=0"]),
        "dpo-g0": (ends_world("g0"), [*ends, "objective.reward.name=g0"]),
    }
    for name, (enumerated, overrides) in plans.items():
        run, recipe, learner = make_run(
            root / name, enumerated, [*overrides, "dual.responses_per_prompt=8"]
        )
        play(run, recipe, learner, 2 if name == "caid-0" else 1)
    return [root / name for name in plans]


FEW = ["dual.responses_per_prompt=8"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A round of another world with one constraint and other prompts."""
    other = random_world(5, 1, prompts=20, responses=20, margin=0.2)
    folder = tmp_path_factory.mktemp("other") / "elsewhere"
    run, recipe, learner = make_run(folder, other, FEW)
    learner.prompts["prompt"] = "another"
    play(run, recipe, learner, 1)
    return run


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    result = cdpo("compare", *runs, "--output", folder, "--samples", 2, check=0)
    return folder, result.stdout


def paired(path, number, name) -> pd.Series:
    """Mean of the policy's scores minus π_ref's on every test prompt, from the tables alone."""
    run = RunDirectory(path)
    tables = [pd.read_parquet(file) for file in (run.samples_file(number), run.reference_file)]
    means = [t[t["split"] == "test"].groupby("prompt_id")[name].mean() for t in tables]
    return means[0] - means[1]


@pytest.mark.parametrize("name", ["caid-0", "caid-1", "caid-wide", "mocan", "dpo-g0"])
def test_the_csv_holds_the_numbers_of_the_runs_files(runs, written, name):
    rows = {row["run"]: row for row in csv.DictReader((written[0] / "compare.csv").open())}
    assert list(rows) == [path.name for path in runs]
    row, path = rows[name], next(path for path in runs if path.name == name)
    records, number = read_records(RunDirectory(path)), int(row["round"])
    record, fixed = records[number], name.startswith("dpo")
    here, start = record.exact_on("test"), read_optimum(RunDirectory(path))["all"].reference
    for objective in ("r", "g0", "g1"):
        gain, difference = float(row[f"gain.{objective}"]), paired(path, number, objective)
        assert gain == pytest.approx(difference.mean())
        error = difference.std() / np.sqrt(len(difference))
        assert float(row[f"gain_se.{objective}"]) == pytest.approx(error)
        assert float(row[f"gain_low.{objective}"]) < gain < float(row[f"gain_high.{objective}"])
        of = lambda policy, o=objective: (
            policy.reward if o == row["reward"] else policy.utilities[o]
        )
        assert float(row[f"gain_exact.{objective}"]) == pytest.approx(of(here) - of(start))
    for constraint, value in record.lambda_.items():
        assert float(row[f"lambda.{constraint}"]) == value
        if not fixed:
            demanded = float(row[f"demanded.{constraint}"])
            assert demanded == pytest.approx(0.5 if name == "caid-wide" else 0.2)
            slack = float(row[f"gain.{constraint}"]) - demanded
            assert slack == pytest.approx(record.test.u[constraint])
    assert float(row["kl"]) == record.test.kl
    assert float(row["objective"]) == record.test.objective
    assert row["verdict"] == ("" if fixed else record.verdict)
    seconds = sum(s for r in records for s in r.seconds.values())
    assert float(row["seconds"]) == pytest.approx(seconds, abs=0.01)
    if row["below_optimum_at_most"]:
        bound = min(r.dual_value for r in records if r.dual_value is not None)
        assert float(row["below_optimum_at_most"]) == pytest.approx(bound - record.objective)
    else:
        assert row["certificate_reason"]


def test_the_csv_names_methods_and_what_each_run_lacks(runs, written):
    rows = list(csv.DictReader((written[0] / "compare.csv").open()))
    assert {row["method"] for row in rows} == {"CAID", "MoCAN", "DPO on g0"}
    assert rows[-1]["demanded.g1"] == "" and rows[-1]["reward"] == "g0"
    assert any(row["below_optimum_at_most"] for row in rows)


@pytest.fixture(scope="module")
def group(runs):
    (group,), left_out = read_groups(runs, "last")
    assert left_out == []
    return group


def test_seeds_are_one_point_with_a_mean_and_a_t_interval(runs, group):
    table = points(group)
    of = {(row["method"], row["setting"]): row for _, row in table.iterrows()}
    assert group.reward == "r" and group.utilities == ["g0", "g1"] and len(table) == 4
    point = of["CAID", (0.2, 0.2)]
    rounds = zip(runs[:2], (1, 0), strict=True)
    gains = np.array([paired(path, number, "g0").mean() for path, number in rounds])
    room = stats.t.ppf(0.975, 1) * gains.std(ddof=1) / np.sqrt(2)
    interval = [gains.mean() - room, gains.mean() + room]
    assert point["runs"] == 2 and point["gain_g0"] == pytest.approx(gains.mean())
    assert [point["low_g0"], point["high_g0"]] == pytest.approx(interval)
    alone, change = of["CAID", (0.5, 0.5)], group.rows[2].changes["g0"]
    assert alone["gain_g0"] == change.difference
    assert [alone["low_g0"], alone["high_g0"]] == [change.ci_low, change.ci_high]
    assert table["fixed"].sum() == 1 and set(table["alone"].dropna()) == {"g0"}
    assert np.isnan(of["DPO on g0", ()]["demanded_g1"])
    values = [1.0, 3.0, 2.5]
    interval = stats.t.interval(0.9, 2, np.mean(values), stats.sem(values))
    assert t_interval(values, 0.9) == pytest.approx(interval)


def test_what_is_written_is_self_contained_and_shows_every_run(runs, written):
    folder, printed = written
    html = (folder / "compare.html").read_text()
    page = Page(html)
    assert not re.search(r"https?:", html) and not page.of("link") and not page.of("script")
    assert "default-src 'none'" in html
    # achieved and front by utility, and both utilities in a plane
    figures = 2 + 2 + 1
    assert len(page.of("img")) == len(page.of("source")) == figures
    for image in page.of("img") + page.of("source"):
        assert image.get("src", image.get("srcset")).startswith("data:image/png;base64,")
        assert image.get("alt", "x")
    assert len(list(folder.glob("*.png"))) == 2 * figures
    assert printed.endswith(f"{folder / 'compare.html'}\n")
    markdown = (folder / "compare.md").read_text()
    for path in runs:
        assert path.name in printed and path.name in html and path.name in markdown


def test_means_over_seeds_stand_in_a_table_of_their_own(group, written):
    folder, printed = written
    caid = points(group).iloc[0]
    gain, low, high = (signed(caid[f"{key}_g0"]) for key in ("gain", "low", "high"))
    for name in ("compare.html", "compare.md"):
        text = (folder / name).read_text()
        assert f"+0.200 → {gain}" in text and f"[{low}, {high}]" in text
    assert f"+0.200 → {gain}" in printed and f"[{low}, {high}]" in printed


def test_first_draws_of_the_reference_and_of_every_run_stand_side_by_side(runs, written):
    folder, printed = written
    page = Page((folder / "compare.html").read_text())
    assert len(page.answers) == 2 * (1 + len(runs))
    run = RunDirectory(runs[0])
    for index, file in enumerate((run.reference_file, run.samples_file(1))):
        table = read_parquet(file)
        first = table[table["split"] == "test"].drop_duplicates("prompt_id").iloc[0]
        assert page.answers[index] == first["response"] and first["response"] in printed


def test_json_is_valid_and_rounds_are_chosen_per_run(runs):
    words = ["compare", runs[0], runs[4], "--round", "0", "--json", "--samples", 1]
    content = json.loads(cdpo(*words, check=0).stdout)
    (group,) = content["groups"]
    assert [row["round"] for row in group["runs"]] == [0, 0]
    assert len(group["samples"][0]["answers"]) == 3
    assert group["points"][1]["demanded_g0"] is None and content["left_out"] == []


def test_runs_of_other_worlds_are_told_apart_and_never_mixed(runs, elsewhere, tmp_path):
    unplayed, recipe, learner = make_run(tmp_path / "unplayed", random_world(5), FEW)
    play(unplayed, recipe, learner, 0)
    groups, left_out = read_groups([runs[0], elsewhere.path, runs[3], unplayed.path], "last")
    assert [[row.name for row in g.rows] for g in groups] == [["caid-0", "mocan"], ["elsewhere"]]
    assert groups[1].apart.startswith("other test prompts (")
    assert "no round has been played yet" in left_out[0][1]


def test_groups_and_what_is_left_out_are_written(elsewhere, tmp_path):
    """A run, the same one on another prompt, and one without a round."""
    other, unplayed = RunDirectory(tmp_path / "other"), RunDirectory(tmp_path / "unplayed")
    for run in (other, unplayed):
        shutil.copytree(elsewhere.path, run.path)
    write_parquet(other.prompts().assign(prompt="yet another"), other.prompts_file)
    state = unplayed.state()
    unplayed.write_state(state.model_copy(update={"lambda_": state.lambda_[:1]}))
    folder = tmp_path / "out"
    paths = [elsewhere.path, other.path, unplayed.path]
    printed = cdpo("compare", *paths, "-o", folder, check=0).stdout
    assert "group 2: not comparable with group 1: other test prompts" in printed
    assert "left out: unplayed: " in printed
    html = (folder / "compare.html").read_text()
    assert "Not comparable with group 1:" in html and "no round has been played yet" in html
    assert {"1-front-1-g0.png", "2-front-1-g0.png"} <= {file.name for file in folder.iterdir()}


def test_identities_differ_by_policy_law_prompts_and_scorers():
    one = {"policy": "p", "law": "l", "test prompts": "t", "scorers": {"r": "1", "g": "2"}}
    assert why_not_comparable(one, one | {"scorers": {"r": "1", "h": "3"}}) is None
    reasons = {
        "policy": "another reference policy (x against p)",
        "law": "another sampling law",
        "test prompts": "other test",
    }
    for key, reason in reasons.items():
        assert why_not_comparable(one, one | {key: "x"}).startswith(reason)
    another = why_not_comparable(one, one | {"scorers": {"g": "3"}})
    assert another == "another scorer of g (3 against 2)"
    nothing = why_not_comparable(one, one | {"scorers": {"h": "3"}})
    assert nothing == "no objective in common (h against r, g)"


def test_real_runs_of_the_embedded_world_compare_by_their_recorded_hashes(small_run, run):
    assert identity(small_run) == identity(run)
    assert set(identity(run)["scorers"]) == {"helpful", "harmless"}
    state = run.state()
    state.hashes["scorers"]["harmless"] = "python:harmless:changed"
    run.write_state(state)
    printed = cdpo("compare", small_run.path, run.path, "--round", "0", check=0).stdout
    assert "another scorer of harmless (python:harmless:changed against" in printed


def test_names_answers_and_prompts_are_text_never_markup(elsewhere, tmp_path):
    run = RunDirectory(tmp_path / "<b>run" / "<img src=x onerror=alert(1)>")
    shutil.copytree(elsewhere.path, run.path)
    for path in (run.samples_file(0), run.reference_file):
        write_parquet(read_parquet(path).assign(response=HOSTILE), path)
    write_parquet(run.prompts().assign(prompt=HOSTILE), run.prompts_file)
    cdpo("compare", run.path, "-o", tmp_path / "out", check=0)
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert not page.of("b") and not page.of("script")
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert set(page.answers) == {HOSTILE}
    assert "<img" not in (tmp_path / "out" / "compare.md").read_text()


def test_mistakes_are_one_line(refused, runs, elsewhere, tmp_path):
    refused("compare", runs[0], runs[0], match="is given twice")
    refused("compare", tmp_path, match="not a run directory")
    unknown = "cannot be compared: --round 7: give a round from 0 to 1"
    refused("compare", runs[0], "--round", "7", match=unknown)
    (tmp_path / "file").write_text("")
    refused("compare", elsewhere.path, "-o", tmp_path / "file", match="cannot be written")


WITHOUT_TORCH = """
import sys
from constrained_dpo.cli.main import app

try:
    app(["compare", sys.argv[1], "--json"])
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = "torch transformers trl peft datasets bitsandbytes matplotlib".split()
assert not (imported := set(heavy) & set(sys.modules)), imported
"""


def test_compare_needs_no_torch(runs):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(runs[0])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
