"""Constraints by category: with categories that share no prompt the problem falls apart, so every
figure is that of a category's own world; with others scipy is the oracle."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.dual.feasibility import diagnose_feasibility
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.sensitivity import bootstrap_multipliers
from constrained_dpo.dual.solution import SolveRule
from constrained_dpo.dual.steps import auto_step_scale
from constrained_dpo.estimates.slack import estimate_subgradient, prompt_slack
from constrained_dpo.estimates.trial import trial
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from data_prep.labels.lagrangian import lagrangian_score
from tests.helpers.conditional import by_threshold, draw, solve
from tests.helpers.tables import random_world

ROWS = {"g.a": slice(0, 5), "g.b": slice(5, 17), "g.c": slice(17, 24)}
OVERLAPPING = {"g.a": slice(0, 12), "g.b": slice(8, 24), "g.c": slice(3, 9)}
MARGINS = {"g.a": 0.5, "g.b": 0.3, "g.c": 0.6}


def with_categories(rows: dict[str, slice], seed: int = 3) -> TabularWorld:
    """A world of 24 prompts whose one utility is constrained on the rows of each category."""
    world = random_world(seed, prompts=24, responses=30)
    utility, utilities = world.utilities["g0"], {}
    for name, chosen in rows.items():
        utilities[name] = np.full_like(utility, np.nan)
        utilities[name][chosen] = utility[chosen]
    constraints = tuple(Constraint(name, margin=MARGINS[name]) for name in rows)
    return TabularWorld(
        ConstrainedProblem("r", world.problem.beta, constraints),
        world.ref_logp,
        world.reward,
        utilities,
    )


def alone(world: TabularWorld, name: str) -> TabularWorld:
    """The world of one category's prompts, with its one constraint."""
    rows = ~np.isnan(world.utilities[name][:, 0])
    constraint = next(c for c in world.problem.constraints if c.name == name)
    return TabularWorld(
        replace(world.problem, constraints=(constraint,)),
        world.ref_logp[rows],
        world.reward[rows],
        {name: world.utilities[name][rows]},
    )


def samples_of(world: TabularWorld, seed: int, number: int = 64) -> pd.DataFrame:
    frame = draw(world, world.ref_logp, number, seed)
    return frame.assign(response_id=[f"y{i}" for i in range(len(frame))])


@pytest.mark.parametrize("name", ROWS)
def test_the_exact_optimum_of_a_category_is_that_of_its_own_world(name):
    world = with_categories(ROWS)
    own, whole = alone(world, name).exact_optimum, world.exact_optimum
    assert whole.lambda_[name] == pytest.approx(own.lambda_[name], rel=1e-6)
    assert whole.optimal.utilities[name] == pytest.approx(own.optimal.utilities[name], rel=1e-6)
    assert whole.optimal.u[name] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rows", [ROWS, OVERLAPPING], ids=["apart", "overlapping"])
def test_the_dual_function_and_its_minimum_are_scipys(rows):
    world = with_categories(rows)
    utilities = np.stack([np.nan_to_num(world.utilities[n]) for n in rows])
    shares = np.array([(~np.isnan(world.utilities[n][:, 0])).mean() for n in rows])
    levels = world.levels.to_numpy() * shares

    def dual(lam: np.ndarray) -> float:
        score = (world.reward + np.tensordot(lam, utilities, 1)) / world.problem.beta
        log_z = special.logsumexp(score + world.ref_logp, axis=1)
        return float(world.problem.beta * log_z.mean() - lam @ levels)

    oracle = optimize.minimize(
        dual, np.ones(3), bounds=[(0, 50)] * 3, method="L-BFGS-B", options={"ftol": 1e-15}
    )
    solution = world.optimum
    assert solution.dual_value == pytest.approx(oracle.fun, abs=1e-9)
    assert np.allclose(solution.lambda_, oracle.x, atol=1e-4)
    best = world.exact_optimum
    assert best.objective == pytest.approx(best.optimal.objective, abs=1e-6)  # no duality gap


def test_samples_of_a_category_say_what_they_say_alone():
    world = with_categories(ROWS)
    samples, reference = samples_of(world, 1), samples_of(world, 2)
    together = estimate_subgradient(samples, reference, world.problem)
    lam = pd.Series(MARGINS)
    shift = dict.fromkeys(ROWS, 0.0)
    whole = trial(samples, reference, world.problem, lam, 1.0, shift)
    solved = solve_one_shot(ScoreTable.from_frame(reference, world.problem), world.problem)
    steps = auto_step_scale(ScoreTable.from_frame(reference, world.problem), world.problem)
    for name in ROWS:
        problem = alone(world, name).problem
        rows = [frame[frame[name].notna()] for frame in (samples, reference)]
        own = estimate_subgradient(*rows, problem)
        columns = ["u", "se", "num_prompts", "low", "high", "one_low"]
        assert np.allclose(together.loc[name, columns], own.loc[name, columns])
        part = trial(*rows, problem, lam[[name]], 1.0, shift)
        assert whole.u[name] == pytest.approx(part.u[name])
        assert whole.u_se[name] == pytest.approx(part.u_se[name])
        assert whole.slope[name][name] == pytest.approx(part.slope[name][name])
        assert all(whole.slope[name][other] == 0 for other in ROWS if other != name)
        assert whole.slope_kappa[name] == pytest.approx(part.slope_kappa[name])
        table = ScoreTable.from_frame(rows[1], problem)
        single = solve_one_shot(table, problem)
        assert solved.lambda_[name] == pytest.approx(single.lambda_[name], rel=1e-5)
        assert solved.utilities[name] == pytest.approx(single.utilities[name], rel=1e-5)
        reward = ScoreTable.from_frame(reference, world.problem)
        expected = auto_step_scale(table, problem)[name] * reward.within_std(reward.reward)
        assert steps[name] == pytest.approx(expected / table.within_std(table.reward), rel=0.02)


@pytest.mark.parametrize("rows", [ROWS, OVERLAPPING], ids=["apart", "overlapping"])
def test_trials_find_the_multipliers_of_every_category(rows):
    world = by_threshold(with_categories(rows))
    right = world.optimum.lambda_
    rule = SolveRule(
        low=right / 4, high=right * 4, tolerance=pd.Series(0.02, index=right.index), trials=8
    )

    def family(of: TabularWorld, lam: pd.Series, kappa: float) -> np.ndarray:
        return of.maximizer(lam)

    point, _ = solve(world, rule, right * 2, 5, family, number=512)
    u = pd.Series(world.evaluate(world.maximizer(point.lambda_)).u)
    assert point.done and (u.abs() < 0.04).all(), u


def test_a_level_out_of_reach_names_its_category():
    world = with_categories(ROWS)
    constraints = tuple(
        c.at(9.0) if c.name == "g.b" else c.at(0.1) for c in world.problem.constraints
    )
    problem = replace(world.problem, constraints=constraints)
    table = ScoreTable.from_frame(samples_of(world, 4), problem)
    verdict = diagnose_feasibility(table, problem)
    own = diagnose_feasibility(
        ScoreTable.from_frame(
            samples_of(world, 4).dropna(subset=["g.b"]),
            one := alone(replace(world, problem=problem), "g.b").problem,
        ),
        one,
    )
    assert verdict.constraints == ("g.b",)
    assert verdict.shortfall["g.b"] == pytest.approx(own.shortfall["g.b"])
    assert verdict.largest["g.b"] == pytest.approx(own.largest["g.b"])


def test_bootstrapped_prompts_keep_each_categorys_own_level():
    world = with_categories(ROWS)
    table = ScoreTable.from_frame(samples_of(world, 6), world.problem)
    lam = solve_one_shot(table, world.problem).lambda_
    drawn = bootstrap_multipliers(table, world.problem, 40, np.random.default_rng(0))
    assert ((drawn.interval["low"] < lam * 1.3) & (lam * 0.7 < drawn.interval["high"])).all()


def test_a_utility_counts_nothing_where_it_does_not_concern_the_prompt():
    frame = pd.DataFrame({"prompt_id": ["p", "q"], "r": [1.0, 2.0], "g.a": [np.nan, 3.0]})
    assert lagrangian_score(frame, "r", pd.Series({"g.a": 0.5})).tolist() == [1.0, 3.5]
    slack = prompt_slack(
        frame, frame, ConstrainedProblem("r", 1.0, (Constraint("g.a", margin=1.0),))
    )
    assert slack["g.a"].isna().tolist() == [True, False] and slack["g.a"]["q"] == -1.0


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("g.a", [np.nan, 1.0], "null for some responses to a prompt and not for others"),
        ("g.a", [np.nan, np.nan], "column g.a is null in every row"),
        ("g", [np.nan, 1.0], "column g is not a finite number"),
        ("g.a", [np.inf, 1.0], "column g.a is not a finite number"),
    ],
)
def test_other_holes_in_scores_are_refused(column, values, words):
    frame = pd.DataFrame(
        {"prompt_id": ["p", "p"], "response_id": ["y", "z"], "r": [0.0, 1.0], column: values}
    )
    with pytest.raises(UserError, match=words):
        ScoreTable.from_frame(
            frame, ConstrainedProblem("r", 1.0, (Constraint(column, margin=1.0),))
        )


@pytest.mark.slow
@pytest.mark.parametrize(("leak", "answer"), [(0.1, 0.6), (0.2, 1.0)])
def test_leaks_between_constraints_are_solved_for(leak, answer):
    """Eight constraints of six prompts each, 64 responses a trial; what a multiplier does reaches
    the others by `leak`, and a constraint answers its own by `answer`."""
    rows = {f"g.c{i}": slice(6 * i, 6 * i + 6) for i in range(8)}
    errors: list[float] = []
    for seed in range(6):
        world = random_world(seed, prompts=48, responses=60)
        utility = world.utilities["g0"]
        inside = {name: np.isin(np.arange(48), np.r_[part])[:, None] for name, part in rows.items()}
        utilities = {name: np.where(here, utility, np.nan) for name, here in inside.items()}
        constraints = tuple(Constraint(name, margin=0.4) for name in rows)
        world = by_threshold(
            replace(
                world, problem=replace(world.problem, constraints=constraints), utilities=utilities
            )
        )
        right, rng = world.optimum.lambda_, np.random.default_rng(seed)
        mixing = answer * np.eye(8) + leak * rng.normal(size=(8, 8)) * (1 - np.eye(8))

        def leaky(of: TabularWorld, lam: pd.Series, kappa: float, mixing=mixing) -> np.ndarray:
            reached = np.clip(mixing @ lam.to_numpy(), 0, None)
            return of.maximizer(pd.Series(reached, index=lam.index))

        rule = SolveRule(right * 0, right * 5, pd.Series(0.008, index=right.index), trials=8)
        start = right * np.exp(0.4 * rng.normal(size=8))
        point, _ = solve(world, rule, start, seed, leaky, number=64)
        u = pd.Series(world.evaluate(leaky(world, point.lambda_, 1.0)).u) / 0.4
        errors += u.where((point.lambda_ > 0) | (u < 0), 0.0).abs().tolist()
    # without the leaks in its prediction: 15 and 18 %
    assert np.median(errors) < 0.04 and np.quantile(errors, 0.9) < 0.11
