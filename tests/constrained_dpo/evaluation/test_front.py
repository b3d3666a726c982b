"""A conditional run's front with the exact maximizer as its learner: every member is known."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.verdict import front_confidence
from constrained_dpo.evaluation.front import (
    play_front,
    play_points,
    read_front,
    settings_of,
    stored_points,
)
from constrained_dpo.evaluation.front_record import Front, FrontPoint, Setting
from constrained_dpo.evaluation.front_source import FrontOptions, FrontSource
from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.problem import Constraint
from data_prep.errors import UserError
from tests.helpers.rounds import make_run, play, tables_of
from tests.helpers.tables import random_world

CONDITIONAL = ("dual.method=solve", "fit.conditional={}", "dual.rounds=1", "dual.trials=3")

PROMPTS = 24

FIRST = {"g0": 0.8, "g1": 0.8}
"""λ_0, not far from λ*."""


def played_run(path, constraints=1, overrides=()):
    """A conditional run of one round: run, recipe, learner."""
    world = random_world(3, constraints, prompts=PROMPTS, responses=30)
    init = (
        f"dual.init={{{', '.join(f'{n}: {v}' for n, v in FIRST.items() if n in world.utilities)}}}"
    )
    run, recipe, learner = make_run(path, world, [*CONDITIONAL, init, *overrides])
    play(run, recipe, learner, 1)
    return run, run.recipe(), learner


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    return played_run(tmp_path_factory.mktemp("front") / "run")


@pytest.fixture(scope="module")
def front(played) -> Front:
    run, recipe, learner = played
    settings = settings_of(run, recipe, margins={"g0": [0.0, 0.2, 0.4, 0.6]})
    return play_front(run, recipe, learner, settings, FrontOptions())


def on_dual(learner, recipe, point) -> dict[str, float]:
    """The exact slack of a point's member on the dual prompts, at the point's levels."""
    half, world = PROMPTS // 2, learner.world
    problem = replace(
        recipe.problem, constraints=tuple(Constraint(n, margin=b) for n, b in point.levels.items())
    )
    dual = TabularWorld(
        problem,
        world.ref_logp[:half],
        world.reward[:half],
        {name: values[:half] for name, values in world.utilities.items()},
    )
    tilted = replace(dual, problem=replace(problem, beta=problem.beta / point.kappa))
    return dual.evaluate(tilted.maximizer(pd.Series(point.lambda_))).u


def test_every_margin_is_met_by_the_exact_member(played, front):
    _, recipe, learner = played
    errors = np.array([on_dual(learner, recipe, point)["g0"] for point in front.rows])
    # π_ref's mean was sampled once, so every member is off by that error too
    assert len(errors) == 4 and np.abs(errors - errors.mean()).max() < 0.05
    assert np.abs(errors).max() < 0.1
    lambdas = [point.lambda_["g0"] for point in front.rows]
    rewards = [point.reward for point in front.rows]
    assert lambdas == sorted(lambdas) and rewards == sorted(rewards, reverse=True)


def test_each_point_is_one_look_and_pays_for_it(played, front):
    run, recipe, _ = played
    looks = [run_point(run, key) for key in front.looks]
    assert [point.look for point in looks] == [1, 2, 3, 4]
    for point in looks:
        assert point.test.verdict_confidence == front_confidence(0.95, point.look, 1)
    confidences = [point.test.verdict_confidence for point in looks]
    assert confidences == sorted(confidences) and len(set(confidences)) == 4
    assert min(confidences) > run_confidence(run, recipe)


def run_point(run, key) -> FrontPoint:
    return FrontPoint.read(run.front_folder(key) / "point.json")


def run_confidence(run, recipe) -> float:
    return FrontSource(run, recipe, 0, FrontOptions()).record.test.verdict_confidence


def test_the_same_point_is_stored_and_more_margins_join(played, front):
    run, recipe, learner = played
    again = settings_of(run, recipe, margins={"g0": [0.2, 0.6]})
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("front/*/point.json")}
    assert stored_points(run, recipe, again, FrontOptions()) is not None
    unchanged = play_front(run, recipe, None, again, FrontOptions())
    assert unchanged == front
    more = settings_of(run, recipe, margins={"g0": 0.3})
    assert stored_points(run, recipe, more, FrontOptions()) is None
    joined = play_front(run, recipe, learner, more, FrontOptions())
    assert joined.looks[:4] == front.looks and len(joined.looks) == 5
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert [point.levels["g0"] for point in joined.rows] == [0.0, 0.2, 0.3, 0.4, 0.6]
    other = play_points(run, recipe, learner, more, FrontOptions(seed=1))[0]
    assert other.key != run_point(run, joined.looks[4]).key and other.look == 6


def test_records_survive_json(played, front):
    run, _, _ = played
    assert Front.from_json(json.loads(json.dumps(front.to_json()))) == front
    point = run_point(run, front.looks[0])
    assert FrontPoint.from_json(json.loads(json.dumps(point.to_json()))) == point


class Killed(BaseException):
    """Stands for a kill."""


class Mortal(TabularLearner):
    """Is killed at one of its calls to `sample`."""

    def __init__(self, learner, calls: int) -> None:
        super().__init__(learner.world, learner.prompts)
        object.__setattr__(self, "left", [calls])

    def sample(self, *arguments, **options):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Killed
        return super().sample(*arguments, **options)


@pytest.mark.parametrize("calls", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_front_goes_on_to_the_same_numbers(played, tmp_path, calls):
    (run, recipe, learner), fronts = played, []
    for name in ("whole", "killed"):
        path = shutil.copytree(run.path, tmp_path / name / "run")
        shutil.rmtree(path / "front", ignore_errors=True)
        run = type(run)(path)
        settings = settings_of(run, recipe, margins={"g0": [0.5, 0.1]})
        if name == "killed":
            with pytest.raises(Killed):
                play_front(run, recipe, Mortal(learner, calls), settings, FrontOptions())
            first = read_front(run)
            assert len(first.looks) == 2 and len(first.points) < 2
        fronts.append((play_front(run, recipe, learner, settings, FrontOptions()), tables_of(run)))
    assert fronts[0] == fronts[1]
    assert not list(run.path.rglob("shards/*")) and not list(run.path.rglob("front/*/.adapter*"))


def test_what_lies_outside_the_trained_range_is_said(played):
    run, recipe, learner = played
    source = FrontSource(run, recipe, 0, FrontOptions())
    high, far = float(source.law.high["g0"]), float(source.law.high["g0"] * source.law.factor)
    settings = [Setting(lambda_={"g0": 1.2 * high}), Setting(margins={"g0": 50.0})]
    beyond, edge = play_points(run, recipe, learner, settings, FrontOptions())
    assert beyond.outside == {"g0": "high"} and not beyond.at_edge and beyond.trials == []
    assert edge.at_edge == {"g0": "high"} and edge.outside == {"g0": "high"}
    assert edge.lambda_["g0"] == pytest.approx(min(far, recipe.dual.max_lambda))
    assert edge.verdict == "violated"
    within = play_points(run, recipe, learner, [Setting(lambda_={"g0": 0.9 * high})], beyond_seed())
    assert within[0].outside == {} and within[0].kappa_outside == ""


def beyond_seed() -> FrontOptions:
    return FrontOptions(responses=8, seed=7)


def test_kappa_scales_how_far_a_member_goes(played):
    run, recipe, learner = played
    settings = settings_of(run, recipe, kappas=[0.5, 1.0, 1.5])
    points = play_points(run, recipe, learner, settings, FrontOptions())
    lambda_ = FrontSource(run, recipe, 0, FrontOptions()).record.policy_lambda
    assert all(point.lambda_ == lambda_ for point in points)
    assert [point.kappa_outside for point in points] == ["low", "", "high"]
    kls = [point.test.kl for point in points]
    assert kls == sorted(kls) and kls[0] < 0.5 * kls[1]
    at_half = settings_of(run, recipe, margins={"g0": 0.3}, kappas=[0.5])
    solved = play_points(run, recipe, learner, at_half, FrontOptions())[0]
    assert solved.kappa == 0.5 and solved.lambda_ != lambda_
    assert abs(on_dual(learner, recipe, solved.row(recipe.problem))["g0"]) < 0.1


@pytest.mark.slow
def test_a_verdict_at_the_lower_bound_is_aimed_at(tmp_path):
    """Room enough for *satisfied* at the confidence that the point's own look is held at."""
    run, recipe, learner = played_run(
        tmp_path / "run", 1, ["dual.confidence_side=lower", "dual.responses_per_prompt=256"]
    )
    settings = settings_of(run, recipe, margins={"g0": [0.4, 0.2]})
    front = play_front(run, recipe, learner, settings, FrontOptions())
    assert [point.verdict for point in front.rows] == ["satisfied", "satisfied"]
    assert all(point.u["g0"] > 0 for point in front.rows)


@pytest.mark.slow
def test_two_constraints_are_held_together(tmp_path):
    run, recipe, learner = played_run(tmp_path / "run", 2, ["dual.responses_per_prompt=256"])
    settings = settings_of(run, recipe, margins={"g1": [0.2, 0.5]})
    front = play_front(run, recipe, learner, settings, FrontOptions())
    assert [point.levels for point in front.rows] == [{"g0": 0.4, "g1": m} for m in (0.2, 0.5)]
    slacks = [on_dual(learner, recipe, point) for point in front.rows]
    assert all(min(point.lambda_.values()) > 0 for point in front.rows)
    assert max(abs(u) for slack in slacks for u in slack.values()) < 0.1, slacks


def test_settings_are_combinations_and_defaults(tmp_path):
    run, recipe, _ = played_run(tmp_path / "run", 2)
    default = settings_of(run, recipe)
    assert len(default) == 9 and default[0].margins == {"g0": 0.4, "g1": 0.4}
    shares = sorted(round(setting.margins["g1"] / 0.4, 9) for setting in default)
    assert (shares[0], shares[-1]) == (0.0, 1.5) and len(set(shares)) == 9
    both = settings_of(run, recipe, {"g0": [0.1, 0.2]}, {"g1": 0.7}, [0.5, 1.0])
    assert len(both) == 2 * 2 + 2
    assert {s.kappa for s in both} == {0.5, 1.0}
    assert sum(s.lambda_ is not None for s in both) == 2
    for wrong, match in (
        ({"margins": {"other": 1.0}}, "margin of other"),
        ({"lambdas": {"g0": -1.0}}, "finite and ≥ 0"),
        ({"kappas": [0.0]}, "kappa is 0"),
        ({"margins": {"g0": float("nan")}}, "finite"),
    ):
        with pytest.raises(UserError, match=match):
            settings_of(run, recipe, **wrong)


def test_a_run_without_a_family_has_no_front(tmp_path):
    world = random_world(3, 1, prompts=8, responses=10)
    run, recipe, _ = make_run(tmp_path / "run", world)
    with pytest.raises(UserError, match="has no family"):
        settings_of(run, recipe)
    run, recipe, _ = make_run(tmp_path / "conditional" / "run", world, CONDITIONAL)
    with pytest.raises(UserError, match="no round has been played"):
        settings_of(run, recipe)
