"""`cdpo compare` over real runs (exact maximizer as the learner): its numbers against the files,
who is not mixed, the page."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.intervals import seeds_interval
from constrained_dpo.experiments.compare import identity, points, read_groups, why_not_comparable
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.methods import (
    METHODS,
    describe_method,
    method_content,
    method_labels,
    method_overrides,
    settings_line,
)
from constrained_dpo.report.contents import signed
from data_prep.errors import UserError
from data_prep.tables import read_parquet, write_parquet
from tests.helpers.cli import cdpo
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.paths import QUICKSTART, RECIPES
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
    """CAID at two margins, the first with three seeds; MoCAN at one; DPO on the reward and on a
    utility alone. Two rounds each."""
    root = tmp_path_factory.mktemp("runs")
    ends = ["dual.method=fixed", "dual.init=zeros", "seed=0"]
    plans = {f"caid-{s}": (world(0.2), [*METHODS["caid"], f"seed={s}"]) for s in range(3)} | {
        "caid-wide": (world(0.5), [*METHODS["caid"], "seed=0"]),
        "mocan": (world(0.2), [*METHODS["mocan"], "seed=0"]),
        "dpo-r": (world(0.2), ends),
        "dpo-g0": (ends_world("g0"), [*ends, "objective.reward.name=g0"]),
    }
    for name, (known, overrides) in plans.items():
        run, recipe, learner = make_run(
            root / name, known, [*overrides, "dual.responses_per_prompt=8"]
        )
        play(run, recipe, learner, 2)
    return [root / name for name in plans]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    result = cdpo("compare", *runs, "--output", folder, "--samples", 2, check=0)
    return folder, result.stdout


def paired(run_path, number, name) -> pd.Series:
    """Mean of the policy's scores minus π_ref's on every test prompt, from the tables alone."""
    tables = [
        pd.read_parquet(run_path / f)
        for f in (f"rounds/{number:03d}/samples.parquet", "reference.parquet")
    ]
    means = [t[t["split"] == "test"].groupby("prompt_id")[name].mean() for t in tables]
    return means[0] - means[1]


def test_the_csv_holds_the_numbers_of_the_runs_files(runs, written):
    rows = {row["run"]: row for row in csv.DictReader((written[0] / "compare.csv").open())}
    assert list(rows) == [path.name for path in runs]
    for path in runs:
        row, number = rows[path.name], int(rows[path.name]["round"])
        record = json.loads((path / f"rounds/{number:03d}/round.json").read_text())
        exact = json.loads((path / "exact.json").read_text())["all"]["reference"]
        for name in ("r", "g0", "g1"):
            difference = paired(path, number, name)
            assert float(row[f"gain.{name}"]) == pytest.approx(difference.mean())
            assert float(row[f"gain_se.{name}"]) == pytest.approx(
                difference.std() / np.sqrt(len(difference))
            )
            assert (
                float(row[f"gain_low.{name}"])
                < float(row[f"gain.{name}"])
                < float(row[f"gain_high.{name}"])
            )
            values = record["exact"]["all"]
            here = values["reward"] if name == row["reward"] else values["utilities"][name]
            base = exact["reward"] if name == row["reward"] else exact["utilities"][name]
            assert float(row[f"gain_exact.{name}"]) == pytest.approx(here - base)
        for name, value in record["lambda"].items():
            assert float(row[f"lambda.{name}"]) == value
            if not path.name.startswith("dpo"):
                assert float(row[f"demanded.{name}"]) == pytest.approx(
                    0.5 if path.name == "caid-wide" else 0.2
                )
                assert float(row[f"gain.{name}"]) - float(row[f"demanded.{name}"]) == pytest.approx(
                    record["test"]["u"][name]
                )
        assert (
            float(row["kl"]) == record["test"]["kl"]
            and float(row["objective"]) == record["test"]["objective"]
        )
        assert row["verdict"] == ("" if path.name.startswith("dpo") else record["verdict"])
        records = [json.loads(f.read_text()) for f in sorted(path.glob("rounds/*/round.json"))]
        assert float(row["seconds"]) == pytest.approx(
            sum(s for r in records for s in r["seconds"].values()), abs=0.01
        )
        if row["below_optimum_at_most"]:
            bound = min(r["dual_value"] for r in records if r["dual_value"] is not None)
            assert float(row["below_optimum_at_most"]) == pytest.approx(bound - record["objective"])
        else:
            assert row["certificate_reason"]
    assert rows["dpo-g0"]["demanded.g1"] == "" and rows["dpo-g0"]["reward"] == "g0"
    assert {rows[p.name]["method"] for p in runs} == {"CAID", "MoCAN", "DPO on r", "DPO on g0"}


def test_seeds_are_one_point_with_a_mean_and_a_t_interval(runs):
    (group,), _ = read_groups(runs, "last")
    table = points(group)
    of = {(row["method"], row["setting"]): row for _, row in table.iterrows()}
    assert group.reward == "r" and group.utilities == ["g0", "g1"] and len(table) == 5
    point = of["CAID", (0.2, 0.2)]
    gains = np.array([paired(path, 1, "g0").mean() for path in runs[:3]])
    room = stats.t.ppf(0.975, 2) * gains.std(ddof=1) / np.sqrt(3)
    assert point["runs"] == 3 and point["gain_g0"] == pytest.approx(gains.mean())
    assert [point["low_g0"], point["high_g0"]] == pytest.approx(
        [gains.mean() - room, gains.mean() + room]
    )
    alone = of["CAID", (0.5, 0.5)]
    one = group.rows[3].changes["g0"]
    assert [alone["gain_g0"], alone["low_g0"], alone["high_g0"]] == [
        one[k] for k in ("difference", "ci_low", "ci_high")
    ]
    assert table["fixed"].sum() == 2 and set(table["alone"].dropna()) == {"r", "g0"}
    assert np.isnan(of["DPO on g0", ()]["demanded_g1"])
    assert seeds_interval([1.0, 3.0], 0.95)[1:] == pytest.approx(
        (2 - stats.t.ppf(0.975, 1), 2 + stats.t.ppf(0.975, 1))
    )


def test_what_is_written_is_self_contained_and_shows_every_run(runs, written):
    folder, said = written
    html = (folder / "compare.html").read_text()
    page = Page(html)
    assert not re.search(r"https?:", html) and not page.of("link") and not page.of("script")
    assert "default-src 'none'" in html
    assert (
        len(page.of("img")) == len(page.of("source")) == 2 + 2 + 1
    )  # achieved and front by utility, and both utilities in a plane
    assert all(
        i.get("src", i.get("srcset")).startswith("data:image/png;base64,") and i.get("alt", "x")
        for i in page.of("img")
    )
    assert len(list(folder.glob("*.png"))) == 10 and said.endswith(f"{folder / 'compare.html'}\n")
    assert len(page.answers) == 2 * (1 + len(runs))
    markdown = (folder / "compare.md").read_text()
    (group,), _ = read_groups(runs, "last")
    caid = points(group).iloc[
        0
    ]  # three seeds: their mean and interval stand in a table of their own
    for text in (said, html, markdown):
        assert (
            f"+0.200 → {signed(caid['gain_g0'])}" in text
            and f"[{signed(caid['low_g0'])}, {signed(caid['high_g0'])}]" in text
        )
    for path in runs:
        assert path.name in said and path.name in html and path.name in markdown
    for name in ("test", "caid-0"):
        table = read_parquet(
            runs[0] / ("reference.parquet" if name == "test" else "rounds/001/samples.parquet")
        )
        first = table[table["split"] == "test"].drop_duplicates("prompt_id").iloc[0]
        assert (
            page.answers[0 if name == "test" else 1] == first["response"]
            and first["response"] in said
        )


def test_json_is_valid_and_rounds_are_chosen_per_run(runs):
    content = json.loads(
        cdpo("compare", runs[0], runs[5], "--round", "0", "--json", "--samples", 1, check=0).stdout
    )
    (group,) = content["groups"]
    assert [row["round"] for row in group["runs"]] == [0, 0] and len(
        group["samples"][0]["answers"]
    ) == 3
    assert group["points"][1]["demanded_g0"] is None and content["left_out"] == []


def test_runs_of_other_worlds_are_told_apart_and_never_mixed(runs, tmp_path):
    other = random_world(5, 1, prompts=20, responses=20, margin=0.2)
    run, recipe, learner = make_run(
        tmp_path / "other" / "elsewhere", other, ["dual.responses_per_prompt=8"]
    )
    learner.prompts["prompt"] = "another"
    play(run, recipe, learner, 1)
    unplayed, recipe, learner = make_run(
        tmp_path / "none" / "unplayed", other, ["dual.responses_per_prompt=8"]
    )
    play(unplayed, recipe, learner, 0)
    groups, left_out = read_groups([runs[0], run.path, runs[4], unplayed.path], "last")
    assert [[row.name for row in g.rows] for g in groups] == [["caid-0", "mocan"], ["elsewhere"]]
    assert (
        groups[1].apart.startswith("other test prompts (")
        and "no round has been played yet" in left_out[0][1]
    )
    said = cdpo("compare", runs[0], run.path, unplayed.path, "-o", tmp_path / "out", check=0).stdout
    assert (
        "group 2: not comparable with group 1: other test prompts" in said
        and "left out: unplayed: " in said
    )
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "Not comparable with group 1:" in html and "no round has been played yet" in html
    assert {"1-front-1-g0.png", "2-front-1-g0.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_identities_differ_by_policy_law_prompts_and_scorers():
    one = {"policy": "p", "law": "l", "test prompts": "t", "scorers": {"r": "1", "g": "2"}}
    assert why_not_comparable(one, one | {"scorers": {"r": "1", "h": "3"}}) is None
    for key, said in (
        ("policy", "another reference policy (x against p)"),
        ("law", "another sampling law"),
        ("test prompts", "other test"),
    ):
        assert why_not_comparable(one, one | {key: "x"}).startswith(said)
    assert (
        why_not_comparable(one, one | {"scorers": {"g": "3"}})
        == "another scorer of g (3 against 2)"
    )
    assert (
        why_not_comparable(one, one | {"scorers": {"h": "3"}})
        == "no objective in common (h against r, g)"
    )


def test_real_runs_of_the_embedded_world_compare_by_their_recorded_hashes(small_run, run, tmp_path):
    assert identity(small_run) == identity(run) and set(identity(run)["scorers"]) == {
        "helpful",
        "harmless",
    }
    state = run.state()
    state["hashes"]["scorers"]["harmless"] = "python:harmless:changed"
    run.write_state(state)
    said = cdpo("compare", small_run.path, run.path, "--round", "best-dual", check=0).stdout
    assert "another scorer of harmless (python:harmless:changed against" in said


def test_names_answers_and_prompts_are_text_never_markup(tmp_path):
    run, recipe, learner = make_run(
        tmp_path / "<b>run" / "run",
        random_world(2, 1, prompts=12, responses=10),
        ["dual.responses_per_prompt=2"],
    )
    learner.prompts["prompt"] = HOSTILE
    play(run, recipe, learner, 1)
    for path in (run.samples_file(0), run.reference_file):
        write_parquet(read_parquet(path).assign(response=HOSTILE), path)
    hostile = run.path.rename(tmp_path / "<img src=x onerror=alert(1)>")
    cdpo("compare", hostile, "-o", tmp_path / "out", check=0)
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert (
        not page.of("b")
        and not page.of("script")
        and not any("onerror" in attrs for _, attrs in page.tags)
    )
    assert set(page.answers) == {HOSTILE}
    assert "<img" not in (tmp_path / "out" / "compare.md").read_text()


def test_mistakes_are_one_line(refused, runs, tmp_path):
    refused("compare", runs[0], runs[0], match="is given twice")
    refused("compare", tmp_path, match="not a run directory")
    refused(
        "compare",
        runs[0],
        "--round",
        "7",
        match="cannot be compared: --round 7: give a round from 0 to 1",
    )
    (tmp_path / "file").write_text("")
    refused("compare", runs[0], "-o", tmp_path / "file", match="cannot be written")


def test_the_papers_methods_are_known_by_their_settings():
    recipe = load_recipe(QUICKSTART)
    assert {
        m: describe_method(load_recipe(QUICKSTART, method_overrides(m, recipe))) for m in METHODS
    } == {
        "recipe": "subgradient, soft labels, growing pool",
        "caid": "CAID",
        "mocan": "MoCAN",
        "ours": "subgradient, soft labels, growing pool",
    }
    assert (
        describe_method(load_recipe(QUICKSTART, ["objective.constraints=[]"])) == "DPO on helpful"
    )
    weighted = load_recipe(QUICKSTART, method_overrides("weighted_sum", recipe, {"harmless": 0.5}))
    assert describe_method(weighted) == "weighted sum" and weighted.dual.init == {"harmless": 0.5}
    assert settings_line(weighted).startswith(
        "λ fixed at harmless 0.5; soft labels, pairs, growing pool; β 0.25; 7 rounds of 200 steps "
        "× 64"
    )
    safe = load_recipe(QUICKSTART, method_overrides("dpo_harmless", recipe))
    assert (
        safe.problem.reward == "harmless"
        and safe.problem.names == ["helpful"]
        and describe_method(safe) == "DPO on harmless"
    )
    assert (
        safe.scorers["harmless"] == recipe.scorers["harmless"]
        and safe.scorers["helpful"] == recipe.scorers["helpful"]
    )
    labelled = ["fit.labels=given", "fit.label_column=better_response_id", "pool.source=dataset"]
    people = load_recipe(QUICKSTART, labelled)
    for method, name in (
        ("dpo_helpful", "DPO on helpful"),
        ("dpo_harmless", "DPO on harmless"),
        ("weighted_sum", "weighted sum"),
    ):
        turned = load_recipe(
            QUICKSTART, [*labelled, *method_overrides(method, people, {"harmless": 0.5})]
        )
        assert describe_method(turned) == name and turned.fit.labels == "soft"
    with pytest.raises(
        UserError, match=r"--method dpo_funny: there is no such method .* choose among recipe, caid"
    ):
        method_overrides("dpo_funny", recipe)
    safe = RECIPES / "dpo_safe.yaml"
    people = load_recipe(
        safe, ["fit.labels=given", "fit.label_column=safer_response_id", "pool.source=dataset"]
    )
    assert (
        describe_method(people) == "DPO on safer_response_id"
        and describe_method(load_recipe(safe)) == "DPO on harmless"
    )
    assert describe_method(load_recipe(RECIPES / "pecaid_pku_saferlhf.yaml")) == "PeCAID"
    caid = load_recipe(RECIPES / "caid_pku_saferlhf.yaml")
    assert describe_method(caid) == "CAID"


def test_a_papers_method_has_the_passes_of_the_groups_that_it_replaces():
    path = RECIPES / "quickstart_std10.yaml"
    recipe = load_recipe(path)
    groups, caid = recipe.fit, load_recipe(path, method_overrides("caid", recipe)).fit
    assert (groups.group_size, caid.group_size, caid.loss) == (8, 2, "logistic")
    assert groups.batch_size * groups.group_size == caid.batch_size * caid.group_size == 128
    assert groups.groups_per_prompt * groups.group_size == caid.pairs_per_prompt * caid.group_size
    assert load_recipe(path, method_overrides("ours", recipe)).fit == groups
    two = load_recipe(path, ["fit.group_size=2"])  # listwise: groups still
    assert method_overrides("caid", two)[-2:] == ["fit.batch_size=16", "fit.pairs_per_prompt=67"]
    assert method_overrides("caid", load_recipe(QUICKSTART)) == list(METHODS["caid"])
    odd = load_recipe(path, ["fit.group_size=3", "fit.batch_size=5", "fit.groups_per_prompt=1"])
    assert method_overrides("mocan", odd)[-2:] == ["fit.batch_size=7", "fit.pairs_per_prompt=1"]


def test_labels_join_margins_and_seeds_and_say_what_else_differs():
    changes = [
        [],
        ["seed=4", "objective.constraints.harmless.margin=0.9", "name=x"],
        ["fit.steps=50"],
        list(METHODS["mocan"]),
    ]
    recipes = [load_recipe(QUICKSTART, c) for c in changes]
    assert method_content(recipes[0]) == method_content(recipes[1]) != method_content(recipes[2])
    base = "subgradient, soft labels, growing pool"
    assert method_labels(recipes) == [
        f"{base} (steps 200)",
        f"{base} (steps 200)",
        f"{base} (steps 50)",
        "MoCAN",
    ]
    assert method_labels(recipes[:2]) == [base, base]


def test_compare_needs_no_torch(runs):
    code = (
        "import sys\nfrom constrained_dpo.cli.main import app\n"
        f"try: app(['compare', {str(runs[0])!r}, '--json'])\nexcept SystemExit as stop: assert "
        "not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes', "
        "'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, f'imported {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
