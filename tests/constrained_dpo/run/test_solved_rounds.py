"""Conditional rounds with the exact maximizer as the family: the dual solved by trials, whatever
λ_0 was; resumed from any trial; replayed. No network, real files."""

import shutil
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.problem import Constraint
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import RoundRecord, replay
from constrained_dpo.run.rounds import play_round
from data_prep.labels.multipliers import multiplier_columns
from data_prep.readers.tables import read_parquet
from tests.helpers.rounds import make_run, play, tables_of
from tests.helpers.tables import random_world

SOLVE = ("dual.method=solve", "fit.conditional={}", "dual.confidence_side=none")
MANY = "dual.responses_per_prompt=512"


def started_at(factor: float, world: TabularWorld) -> str:
    first = {name: factor * value for name, value in world.optimum.lambda_.items()}
    return f"dual.init={{{', '.join(f'{name}: {value}' for name, value in first.items())}}}"


def exact_on_dual(run, learner, number: int):
    """Exact values of a round's policy on the prompts that it was solved on."""
    world, half = learner.world, len(learner.world.reward) // 2
    utilities = {name: g[:half] for name, g in world.utilities.items()}
    dual = TabularWorld(world.problem, world.ref_logp[:half], world.reward[:half], utilities)
    return dual.evaluate(learner.table(run.adapter_folder(number))[:half])


def assert_near_zero(run, learner, number: int) -> None:
    """Within four standard errors of 30 prompts' samples, a tenth of the margin."""
    exact = exact_on_dual(run, learner, number)
    for constraint in learner.world.problem.constraints:
        assert abs(exact.u[constraint.name]) <= 0.1 * constraint.margin, exact.u


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "edge"), [(4.0, "low"), (0.2, "high")])
def test_a_wrong_first_multiplier_is_made_good_in_the_next_round(tmp_path, factor, edge):
    """λ_0 lies outside the trained range around it: round 0 ends at the range's edge."""
    world = random_world(3, prompts=60, responses=50)
    overrides = [*SOLVE, MANY, started_at(factor, world)]
    run, recipe, learner = make_run(tmp_path / "run", world, overrides)
    first, second = play(run, recipe, learner, 2)
    assert first.at_edge == {"g0": edge} and len(first.trials) <= 3 and first.step == "solved"
    range_ = 3.0 if factor < 1 else 1 / 3
    assert first.lambda_next["g0"] == pytest.approx(first.lambda_["g0"] * range_)
    assert second.lambda_ == first.lambda_next == second.trials[0].lambda_
    assert second.at_edge == {} and 2 <= len(second.trials) <= recipe.dual.trials
    assert_near_zero(run, learner, 1)
    assert replay(run) == run.state().lambda_
    member = np.load(run.adapter_folder(1) / "policy_logp.npy")
    np.testing.assert_array_equal(member, world.maximizer(pd.Series(second.lambda_next)))
    assert second.residual < 1e-6  # it is judged at the multipliers it was solved for


@pytest.mark.slow
def test_two_constraints_are_held_together(tmp_path):
    world = random_world(3, 2, prompts=60, responses=50)
    run, recipe, learner = make_run(tmp_path / "run", world, [*SOLVE, MANY, "fit.refresh=2"])
    play(run, recipe, learner, 2)
    assert_near_zero(run, learner, 1)
    assert replay(run) == run.state().lambda_


@pytest.mark.slow
def test_a_constraint_that_is_met_without_a_multiplier_gets_none(tmp_path):
    """Beside one that binds: complementary slackness."""
    world = random_world(3, 2, prompts=60, responses=50)
    easy = Constraint("g0", margin=-3.0)
    problem = replace(world.problem, constraints=(easy, world.problem.constraints[1]))
    world = replace(world, problem=problem)
    run, recipe, learner = make_run(tmp_path / "run", world, [*SOLVE, MANY])
    _, last = play(run, recipe, learner, 2)
    assert last.lambda_next["g0"] == 0.0 and last.at_edge == {}
    exact = exact_on_dual(run, learner, 1)
    assert exact.u["g0"] > 1 and abs(exact.u["g1"]) <= 0.1 * 0.4


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.6, 9.0])
def test_kappa_meets_a_budget_of_kl(tmp_path, budget):
    """Or stands at the end of its range where that is not enough."""
    world = random_world(3, prompts=60, responses=50)
    overrides = [*SOLVE, MANY, started_at(1.0, world), f"objective.kl_budget={budget}"]
    overrides[1] = "fit.conditional={kappa: [0.5, 1.5]}"
    run, recipe, learner = make_run(tmp_path / "run", world, overrides)
    (record,) = play(run, recipe, learner, 1)
    exact = exact_on_dual(run, learner, 0)
    assert abs(exact.u["g0"]) <= 0.1 * 0.4
    if budget < 1:
        assert exact.kl == pytest.approx(budget, rel=0.05) and 0.5 < record.kappa < 1
    else:
        assert record.kappa == pytest.approx(1.5) and exact.kl < budget
    assert replay(run) == run.state().lambda_
    # the policy is the maximizer at β/κ, which is what its gap is measured at
    assert record.exact_on("dual").lagrangian_gap == pytest.approx(0.0, abs=1e-9)
    assert record.exact_on("dual").beta == pytest.approx(world.problem.beta / record.kappa)
    assert world.exact_optimum.share_closed(record.exact_on("dual")) is None  # P* has β, not β/κ
    kappas = read_parquet(run.pairs_file(0))["kappa"]
    assert kappas.between(0.5, 1.5).all() and np.ptp(kappas) > 0.8


class Death(Exception):
    """What a kill is here."""


@dataclass(frozen=True)
class Mortal(TabularLearner):
    """Dies as it is asked for samples the `left[0]`-th time."""

    left: list[int] = field(default_factory=lambda: [10**6])

    def sample(self, *arguments, **named):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Death
        return super().sample(*arguments, **named)


SMALL = (
    *SOLVE,
    "fit.refresh=2",
    "dual.responses_per_prompt=32",
    "sampling.batch_size=64",
    "dual.trials=4",
)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """One round without a kill; a copy of its run before that round; samplings of the round."""
    world = random_world(6, prompts=20, responses=30)
    run, recipe, learner = make_run(tmp_path_factory.mktemp("uncut") / "run", world, SMALL)
    recipe = prepare(run, recipe, learner, {})
    before = shutil.copytree(run.path, run.path.parent / "before")
    mortal = Mortal(world, learner.prompts)
    play_round(run, recipe, mortal)
    return run, before, 10**6 - mortal.left[0]


@pytest.mark.slow
def test_a_round_killed_at_any_sampling_equals_one_that_was_not(uncut, tmp_path):
    """Inside the refresh, between and within trials, inside the re-scoring; twice in one round."""
    run, before, samplings = uncut
    learner = make_learner(run)
    assert samplings > 18
    for life in {*range(0, samplings, 5), samplings - 1}:
        path = tmp_path / str(life) / "run"
        shutil.copytree(before, path)
        cut = type(run)(path)
        for left in (life, 1):
            mortal = Mortal(learner.world, learner.prompts, [left])
            try:
                play_round(cut, cut.recipe(), mortal)
            except Death:
                assert cut.rounds_done() == 0
        if cut.rounds_done() == 0:
            play_round(cut, cut.recipe(), learner)
        assert tables_of(cut) == tables_of(run), life
        assert not list(cut.path.rglob(".*.tmp")) and not list(cut.path.rglob("shards/*/*"))
        assert not list(cut.path.rglob(".refresh")) and not list(cut.path.rglob(".adapter*"))


def make_learner(run) -> TabularLearner:
    world = random_world(6, prompts=20, responses=30)
    return TabularLearner(world, run.prompts())


@pytest.mark.parametrize("lost", ["adapter", "trial", "trials", "family"])
def test_a_round_that_lost_its_last_files_finds_the_same(uncut, tmp_path, lost):
    run, before, _ = uncut
    cut = type(run)(shutil.copytree(run.path, tmp_path / "run"))
    cut.write_state(type(run)(before).state())
    folder = cut.round_folder(0)
    for name in ("round.json", "off_policy.parquet", "samples.parquet"):
        (folder / name).unlink()
    cut.pool_file(0).unlink()
    shutil.rmtree(folder / "adapter")
    refreshed = [cut.refresh_file(0, 0)]
    assert not refreshed[0].exists()  # its rows went into the pool's part, which is lost
    if lost == "trial":
        sorted((folder / "trials").glob("*.parquet"))[-1].unlink()
    if lost in ("trials", "family"):
        shutil.rmtree(folder / "trials")
    if lost == "family":
        shutil.rmtree(folder / "family")
    play_round(cut, cut.recipe(), make_learner(run))
    ours, theirs = tables_of(cut), tables_of(run)
    if lost != "family":  # what was sampled within the fit is gone with the pool's part
        for tables in (ours, theirs):
            tables.pop("pool/round-000.parquet")
    assert ours == theirs


def test_the_pool_holds_what_was_tried_and_sampled_within_the_fit(uncut):
    run, _, _ = uncut
    pool, record = run.pool(run.recipe(), 1), RoundRecord.read(run.round_file(0))
    assert pool["response_id"].is_unique
    trials = {f"trial:0.0.{number}" for number in range(len(record.trials))}
    sources = {"reference-pool", "refresh:0.0", "round:0", *trials}
    assert set(pool["source"]) == sources
    per_prompt = pool.groupby("source").size() / run.prompts()["split"].eq("dual").sum()
    assert per_prompt["refresh:0.0"] == 16 and per_prompt["round:0"] == 32
    assert {per_prompt[name] for name in trials} == {8}
    assert not list((run.path / "pool").glob("*refresh*"))
    extra = [*multiplier_columns(["g0"]), "kappa"]
    # what was tried keeps the λ of its member; the rest is of the round's own
    tried = pool["source"].isin(trials)
    assert pool.loc[tried, extra].notna().all(axis=None)
    assert pool.loc[~tried, extra].isna().all(axis=None)
    lambdas = pool[tried].groupby("source")["lambda/g0"].unique()
    assert all(lambdas[f"trial:0.0.{k}"] == [t.lambda_["g0"]] for k, t in enumerate(record.trials))
    tables = [read_parquet(file) for file in sorted(run.trials_folder(0).glob("*.parquet"))]
    for table, trial in zip(tables, record.trials, strict=True):
        assert set(table["lambda/g0"]) == {trial.lambda_["g0"]} and set(table["kappa"]) == {1.0}
        assert trial.num_samples == len(table)
