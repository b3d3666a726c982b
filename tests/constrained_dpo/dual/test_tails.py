"""Tails and rates against enumeration, brute force over the tail's point, and scipy."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.tails import first_tail_points, next_tail_points, tilted_weights
from constrained_dpo.kinds import Measure, tail_mean, tail_point, tail_scores
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from tests.helpers.tables import random_world, scored_frame


def world_of(measure: Measure, seed: int, margin: float | None = 0.4, threshold=None, prompts=6):
    world = random_world(seed, prompts=prompts, responses=25)
    name = "g" if measure.kind == "mean" else f"g.{measure.kind}"
    constraint = Constraint(name, margin=margin, threshold=threshold, measure=measure)
    problem = ConstrainedProblem("r", world.problem.beta, (constraint,))
    return replace(world, problem=problem, utilities={"g": world.utilities["g0"]})


@pytest.mark.parametrize("count", [20, 40, 100])
def test_a_tail_is_the_mean_of_the_lowest_scores(count):
    rng = np.random.default_rng(count)
    scores, ones = rng.normal(size=count), np.ones(count)
    lowest = np.sort(scores)[: count // 20]
    assert tail_mean(scores, ones, 0.05) == pytest.approx(lowest.mean(), abs=1e-12)
    assert tail_point(scores, ones, 0.05) == lowest[-1]
    # the same scores in pieces of different weight
    pieces, weights = np.repeat(scores, 3), np.tile([0.2, 0.5, 0.3], count)
    assert tail_mean(pieces, weights, 0.05) == pytest.approx(lowest.mean(), abs=1e-12)


@pytest.mark.parametrize("share", [0.03, 0.2, 0.37])
def test_the_quantile_maximizes_the_tail_mean(share):
    rng = np.random.default_rng(7)
    scores, weights = rng.standard_t(3, size=300), rng.random(300)
    best = minimize_scalar(
        lambda t: -np.average(tail_scores(scores, t, share), weights=weights),
        bounds=(scores.min(), scores.max()),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert tail_mean(scores, weights, share) == pytest.approx(-best.fun, abs=1e-6)


def brute_force(world, level: float) -> float:
    """The best objective under the tail, from D(λ) of every point by scipy alone."""
    (constraint,), beta = world.problem.constraints, world.problem.beta
    share, best = constraint.measure.share, -np.inf
    for point in np.unique(world.utilities["g"]):
        values = tail_scores(world.utilities["g"], point, share)

        def dual(multiplier: float, values=values) -> float:
            exponent = (world.reward + multiplier * values) / beta + world.ref_logp
            return float(beta * np.logaddexp.reduce(exponent, axis=1).mean() - multiplier * level)

        solved = minimize_scalar(dual, bounds=(0.0, 50.0), method="bounded")
        best = max(best, solved.fun)
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("relative", [True, False])
def test_the_exact_optimum_is_the_best_over_all_points(seed, relative):
    measure = Measure("tail", 0.15)
    world = world_of(measure, seed, *((0.5, None) if relative else (None, -0.6)))
    weights = np.exp(world.ref_logp).ravel()
    start = tail_mean(world.utilities["g"].ravel(), weights, 0.15)
    level = start + 0.5 if relative else -0.6
    best = world.exact_optimum
    assert world.levels["g.tail"] == pytest.approx(level)
    assert best.objective == pytest.approx(brute_force(world, level), abs=2e-4)
    assert best.optimal.u["g.tail"] == pytest.approx(0.0, abs=1e-6)
    assert best.optimal.objective == pytest.approx(best.objective, abs=1e-6)
    assert best.reference.u["g.tail"] == pytest.approx(start - level)


def test_a_rate_is_the_mean_of_an_indicator():
    world = world_of(Measure("rate", at=0.3), 4, 0.2)
    plain = world_of(Measure(), 4, 0.2)
    plain = replace(plain, utilities={"g": (plain.utilities["g"] >= 0.3).astype(float)})
    best, same = world.exact_optimum, plain.exact_optimum
    assert best.objective == same.objective
    assert best.lambda_["g.rate"] == same.lambda_["g"]


def drawn(world, logp: np.ndarray, count: int, seed: int) -> pd.DataFrame:
    """Responses of a policy with the world's scores."""
    rng, rows = np.random.default_rng(seed), len(logp)
    cells = np.stack(
        [rng.choice(logp.shape[1], count, p=np.exp(row) / np.exp(row).sum()) for row in logp]
    )
    index, chosen = np.repeat(np.arange(rows), count), cells.ravel()
    return pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in index],
            "r": world.reward[index, chosen],
            "g": world.utilities["g"][index, chosen],
            "sample_logp": logp[index, chosen],
            "ref_logp": world.ref_logp[index, chosen],
        }
    )


def test_first_points_from_samples_come_near_the_exact_ones():
    world = world_of(Measure("tail", 0.1), 3, 0.4, prompts=30)
    reference = drawn(world, world.ref_logp, 200, seed=1)
    points = first_tail_points(reference, world.problem, max_lambda=50.0)
    problem = world.problem.with_tail_points(points)
    best = world.exact_optimum
    there = replace(world, problem=problem).optimum.dual_value
    start = best.reference.objective
    assert there - start > 0.98 * (best.objective - start)
    solution = solve_one_shot(ScoreTable.from_frame(reference, problem), problem)
    weights = tilted_weights(reference, problem, solution.lambda_)
    tail = tail_mean(reference["g"].to_numpy(), weights, 0.1)
    rests = tail_mean(reference["g"].to_numpy(), np.ones(len(reference)), 0.1) + 0.4
    assert tail == pytest.approx(rests, abs=1e-6)  # its level is met where t rests


def test_a_table_takes_the_reference_at_its_own_quantile():
    frame = scored_frame(2, prompts=10, responses=40)
    constraint = Constraint("g.tail", margin=0.3, measure=Measure("tail", 0.1, -0.5))
    problem = ConstrainedProblem("r", 0.5, (constraint,))
    table = ScoreTable.from_frame(frame, problem)
    values = frame["g"].to_numpy()
    reference_tail = tail_mean(values, np.ones(400), 0.1)
    assert table.utilities.mean() == pytest.approx(tail_scores(values, -0.5, 0.1).mean())
    assert table.levels(problem)["g.tail"] == pytest.approx(reference_tail + 0.3)
    assert table.take(np.arange(10)).levels(problem)["g.tail"] == pytest.approx(
        reference_tail + 0.3
    )
    with pytest.raises(UserError, match="needs that policy's own samples"):
        ScoreTable.from_frame(frame.assign(w=0.1), problem, "w")


def test_a_policy_that_is_short_of_its_tail_does_not_draw_the_point_down():
    world = world_of(Measure("tail", 0.1), 3, 0.4, prompts=30)
    best = world.at_best_tails
    point, lambda_ = best.problem.tail_points["g.tail"], pd.Series(best.exact_optimum.lambda_)
    policy = drawn(world, best.maximizer(0.2 * lambda_), 300, seed=2)
    reference = drawn(world, world.ref_logp, 300, seed=3)
    quantile = world.problem.at_tails_of(policy).tail_points["g.tail"]
    start = world.problem.with_tail_points({"g.tail": quantile})
    solved = next_tail_points(policy, reference, start, max_lambda=50.0)["g.tail"]
    assert quantile < point - 0.2
    assert abs(solved - point) < (point - quantile) / 3
    unknown = next_tail_points(policy.assign(sample_logp=np.nan), reference, start, 50.0)
    assert unknown == {"g.tail": quantile}  # no weights without log-probabilities
