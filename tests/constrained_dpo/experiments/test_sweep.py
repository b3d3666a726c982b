"""`cdpo sweep`: what is planned, one prepared pool per seed, a killed sweep goes on to the same
tables, what is refused."""

import json
import logging
import shlex
from itertools import pairwise

import pandas as pd
import pytest
import yaml

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.experiments.sweep import (
    SweepGrid,
    is_finished,
    plan_sweep,
    play_sweep,
    read_pairs,
)
from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, RECIPES
from tests.helpers.rounds import make_run, tables_of
from tests.helpers.tables import random_world

GRID = {"methods": ["caid", "dpo_r"], "seeds": [0], "margins": [{}], "weights": []}


def setting(tmp_path):
    """A recipe file of an enumerated world; how its runs are opened (the exact maximizer), and a
    list of the runs so prepared."""
    world = random_world(3, 1, prompts=20, responses=20)
    make_run(tmp_path / "unused", world, [])
    prompts = pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(20)],
            "prompt": "?",
            "split": ["dual"] * 10 + ["test"] * 10,
        }
    )
    values, drawn = {"r": world.reward, **world.utilities}, []

    class Counted(TabularLearner):
        """Notes whose responses are drawn from π_ref."""

        def sample(self, prompts, *, responses_per_prompt, adapter, source, seed):
            if adapter is None:
                drawn.append(source)
            return super().sample(
                prompts,
                responses_per_prompt=responses_per_prompt,
                adapter=adapter,
                source=source,
                seed=seed,
            )

    def open_run(run: RunDirectory):
        recipe = run.recipe()
        problem = recipe.problem
        limits = tuple(Constraint(c.name, margin=c.margin) for c in recipe.objective.constraints)
        enumerated = TabularWorld(
            ConstrainedProblem(problem.reward, problem.beta, limits),
            world.ref_logp,
            values[problem.reward],
            {n: values[n] for n in problem.names},
        )
        learner = Counted(enumerated, prompts)
        return (recipe if run.state().prepared else prepare(run, recipe, learner, {})), learner

    return tmp_path / "tabular.yaml", open_run, drawn


def plan(recipe, output, rounds=1, **grid):
    few = [f"dual.rounds={rounds}", "dual.responses_per_prompt=8"]
    return plan_sweep(recipe, output, few, SweepGrid(**(GRID | grid)))


def test_the_plan_is_every_margin_of_the_methods_that_look_at_one(tmp_path):
    recipe, _, _ = setting(tmp_path)
    methods = ["caid", "mocan", "weighted_sum", "dpo_r", "dpo_g0"]
    levels = {"margins": [{"g0": 0.2}, {"g0": 0.4}], "weights": [{"g0": 0.5}]}
    planned = plan(recipe, tmp_path / "out", methods=methods, seeds=[0, 1], **levels)
    names = ["caid-g00.2", "caid-g00.4", "mocan-g00.2", "mocan-g00.4", "weighted_sum-g00.5"]
    names += ["dpo_r", "dpo_g0"]
    folders = [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    assert [run.path.name for run in planned] == folders
    assert len({run.pool for run in planned}) == 2
    recipes = [load_recipe(recipe, run.overrides) for run in planned]
    assert [r.objective.constraints[0].margin for r in recipes[:4]] == [0.2, 0.4, 0.2, 0.4]
    assert recipes[4].dual.init == {"g0": 0.5} and recipes[6].problem.reward == "g0"
    assert {r.seed for r in recipes} == {0, 1}
    (single,) = plan(recipe, tmp_path, methods=["recipe"], seeds=[3])
    assert single.path.name == "quickstart-seed3"


def test_a_sweep_draws_one_pool_per_seed_and_compares_at_the_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, "constrained_dpo.experiments.sweep")
    told = lambda: [r.getMessage() for r in caplog.records if r.name.endswith(".sweep")]
    recipe, open_run, drawn = setting(tmp_path)
    planned = plan(recipe, tmp_path / "out", seeds=[0, 1], methods=["caid", "dpo_g0"])
    play_sweep(recipe, planned, open_run)
    assert drawn == ["reference-pool", "reference-reference"] * 2
    assert sum("preparing the pool" in line for line in told()) == 2
    for run in (RunDirectory(item.path) for item in planned):
        pool = f"pools/seed{run.recipe().seed}"
        assert is_finished(run) and run.state().inherited["from"].endswith(pool)
    one, other = (read_parquet(item.path / "reference.parquet") for item in planned[:2])
    pd.testing.assert_frame_equal(one, other, check_like=True)
    printed = cdpo("compare", *[item.path for item in planned], "--json", check=0).stdout
    (group,) = json.loads(printed)["groups"]
    methods = {(p["method"], p["runs"]) for p in group["points"]}
    assert methods == {("CAID", 2), ("DPO on g0", 2)}

    caplog.clear()
    play_sweep(recipe, planned, open_run)
    assert len(drawn) == 4 and len(told()) == len(planned)
    assert all("is done already" in line for line in told())


class Killed(Exception):
    pass


class KilledAtFit(logging.Handler):
    """Ends the process's work when the fit of this number begins."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def emit(self, record):
        self.left -= record.getMessage().endswith("fit ...")
        if self.left == 0:
            raise Killed


@pytest.mark.slow
def test_a_sweep_killed_and_started_again_equals_one_never_killed(tmp_path, caplog):
    """Killed while the pool is prepared, then in the fit of the first run, then in that of the
    second one's second round."""
    caplog.set_level(logging.INFO, "constrained_dpo")
    recipe, open_run, _ = setting(tmp_path)
    whole, cut = (plan(recipe, tmp_path / name, rounds=2) for name in ("whole", "cut"))
    play_sweep(recipe, whole, open_run)

    def dies_while_it_prepares(run):
        run.shard_folder("pool").mkdir(parents=True)
        raise Killed

    with pytest.raises(Killed):
        play_sweep(recipe, cut, dies_while_it_prepares)
    progress = logging.getLogger("constrained_dpo.progress")
    for number in (1, 4):
        handler = KilledAtFit(number)
        progress.addHandler(handler)
        try:
            with pytest.raises(Killed):
                play_sweep(recipe, cut, open_run)
        finally:
            progress.removeHandler(handler)
    assert [RunDirectory(item.path).rounds_done() for item in cut] == [2, 1]
    play_sweep(recipe, cut, open_run)
    for one, other in zip(whole, cut, strict=True):
        assert tables_of(RunDirectory(one.path)) == tables_of(RunDirectory(other.path))


def test_the_dry_run_prints_commands_that_parse_and_plays_nothing(tmp_path):
    grid = ["--margin", "harmless=0.3,0.6", "--method", "ours,dpo_harmless", "--seeds", "0,1"]
    arguments = ["sweep", QUICKSTART, tmp_path / "out", *grid]
    lines = cdpo(*arguments, "--dry-run", check=0).stdout.splitlines()
    assert len(lines) == 2 + 2 * 3 and not (tmp_path / "out").exists()
    for line in lines:
        first, second = (shlex.split(command) for command in line.split(" && "))
        overrides = [word for flag, word in pairwise(first) if flag == "-s"]
        assert first[:2] == ["cdpo", "init"] and second[0] == "cdpo"
        assert load_recipe(first[2], overrides).hash()
    content = json.loads(cdpo(*arguments, "--dry-run", "--json", check=0).stdout)
    assert content["commands"] == lines and len(content["runs"]) == 6


def test_the_papers_pairs_of_margins_are_a_table(tmp_path):
    pairs = RECIPES / "caid_hh_margins.csv"
    settings = read_pairs(pairs)
    assert len(settings) == 14 and settings[0] == {"harmless": 0.1, "humor": 0.45}
    assert settings[-1] == {"harmless": 1.0, "humor": 1.0}
    recipe = RECIPES / "caid_hh_two_constraints.yaml"
    printed = cdpo("sweep", recipe, tmp_path, "--pairs", pairs, "--dry-run", check=0).stdout
    lines = printed.splitlines()
    assert len(lines) == 1 + 14 and "caid_hh_two_constraints-harmless0.3-humor1.2-seed0" in lines[3]
    (tmp_path / "bad.csv").write_text("harmless,humor\n0.1,0.2\n0.3,much\n")
    with pytest.raises(UserError, match=r"row 2: humor is 'much', not a number"):
        read_pairs(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--margin", "humor=1"], "margin of humor: the recipe's constraints are harmless"),
        (["--margin", "harmless=1", "--margins", "harmless=2"], "give one of them"),
        (["--margins", "harmless"], "--margins harmless: write NAME=NUMBER"),
        (["--margin", "harmless=1,1"], "a value is given twice"),
        (["--method", "caid,caid"], "--method: a value is given twice"),
        (["--method", "best"], "there is no such method"),
        (["--method", "weighted_sum"], "belong together"),
        (["--weights", "harmless=1"], "belong together"),
        (["--method", "weighted_sum", "--weights", "humor=1"], "lambda: unknown humor"),
        (["--seeds", "0,x"], "--seeds 0,x: write integers"),
        (
            [
                "-s",
                "objective.constraints.harmless.margin=null",
                "-s",
                "objective.constraints.harmless.threshold=1",
                "--margin",
                "harmless=1",
            ],
            "gives it a threshold",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_played(refused, tmp_path, arguments, match):
    refused("sweep", QUICKSTART, tmp_path / "out", *arguments, match=match)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    recipe, open_run, _ = setting(tmp_path)
    play_sweep(recipe, plan(recipe, tmp_path / "out", methods=["dpo_r"]), open_run)
    raw = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(raw | {"objective": raw["objective"] | {"beta": 0.7}}))
    with pytest.raises(UserError, match="is a run of another recipe"):
        play_sweep(recipe, plan(recipe, tmp_path / "out", methods=["dpo_r"]), open_run)


@pytest.mark.slow
def test_the_command_sweeps_with_real_fits_and_writes_the_comparison(tmp_path):
    few = ["dual.rounds=1", "dual.prompts_per_round=2", "prompts.max_fit=3", "prompts.max_test=2"]
    few += ["sampling.responses_per_prompt=4", "dual.responses_per_prompt=4"]
    few += ["fit.steps=2", "fit.pairs_per_prompt=2", "fit.warmup_steps=0"]
    few += ["policy.quantization=none"]
    options = [word for value in few for word in ("-s", value)]
    folder = tmp_path / "out"
    done = cdpo("sweep", QUICKSTART, folder, "--method", "dpo_harmless", *options, check=0)
    assert "preparing the pool" in done.stderr
    assert done.stdout.endswith("comparison/compare.html\n")
    names = {path.name for path in folder.iterdir()}
    assert names == {"pools", "dpo_harmless-seed0", "comparison"}
    header, row = (folder / "comparison" / "compare.csv").read_text().splitlines()
    assert "gain_exact.harmless" in header and row.split(",")[2] == "DPO on harmless"
    recipe = load_recipe(folder / "dpo_harmless-seed0" / "recipe.yaml")
    assert recipe.problem.reward == "harmless"
