"""Whether the constraints can be met at all: against one linear program over every response."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from constrained_dpo.dual.feasibility import (
    FEASIBLE,
    INFEASIBLE,
    NEARLY,
    NO_EVIDENCE,
    diagnose_feasibility,
)
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint


def feasibility_program(table: ScoreTable, target: np.ndarray, unit: np.ndarray) -> float:
    """max over policies on the samples of the least slack, as one linear program over every
    response's probability."""
    m, rows, prompts = table.utilities.shape[1], len(table.reward), len(table.counts)
    sums = np.zeros((prompts, rows + 1))
    sums[np.repeat(np.arange(prompts), table.counts), np.arange(rows)] = 1
    program = optimize.linprog(
        np.r_[np.zeros(rows), -1.0],
        A_ub=np.c_[-(table.utilities / unit).T / prompts, np.ones(m)],
        b_ub=-target / unit,
        A_eq=sums,
        b_eq=np.ones(prompts),
        bounds=[(0, None)] * rows + [(None, None)],
    )
    return -program.fun


@pytest.mark.parametrize("seed", range(16))
def test_the_largest_slack_is_that_of_the_linear_program(seed):
    rng = np.random.default_rng(seed)
    m, counts = int(rng.integers(1, 5)), rng.integers(1, 20, 25)
    z = rng.normal(size=counts.sum())
    utilities = np.array(
        [(-1) ** i * z * rng.choice([1, 10]) + rng.normal(size=len(z)) for i in range(m)]
    )
    utilities = np.round(utilities) if seed % 2 else utilities
    table = ScoreTable.from_columns(np.repeat(np.arange(25), counts), z, utilities)
    unit = np.array([table.within_std(column) for column in utilities])
    problem = ConstrainedProblem(
        "r", 1.0, tuple(Constraint(f"g{i}", margin=0.4 * s) for i, s in enumerate(unit))
    )
    diagnosis, target = (
        diagnose_feasibility(table, problem),
        table.reference_means() + problem.bounds.to_numpy(),
    )
    firm = diagnosis.verdict in (INFEASIBLE, NO_EVIDENCE) and not diagnosis.together
    for name in diagnosis.constraints if firm else ():  # each fails alone
        i = problem.names.index(name)
        fewer = ScoreTable(
            table.reward, table.utilities[:, [i]], table.log_weight, table.starts, table.counts
        )
        exact = feasibility_program(fewer, target[[i]], np.ones(1))
        assert exact < 0 and diagnosis.shortfall[name] == pytest.approx(-exact, abs=1e-7 * unit[i])
    if not firm:
        assert diagnosis.slack == pytest.approx(feasibility_program(table, target, unit), abs=1e-7)
        # The constraints named are those that limit: without the others the slack is the same.
        named = [problem.names.index(n) for n in diagnosis.constraints]
        fewer = ScoreTable(
            table.reward, table.utilities[:, named], table.log_weight, table.starts, table.counts
        )
        assert diagnosis.slack == pytest.approx(
            feasibility_program(fewer, target[named], unit[named]), abs=1e-7
        )


def normal_table(prompts: int, responses: int, bound: float = np.inf) -> ScoreTable:
    rng = np.random.default_rng(0)
    utility = np.clip(rng.normal(size=(1, prompts, responses)), -bound, bound)
    return ScoreTable.from_arrays(rng.normal(size=(prompts, responses)), utility)


def problem_with(margin: float) -> ConstrainedProblem:
    return ConstrainedProblem("r", 1.0, (Constraint("g", margin=margin),))


def test_infeasible_is_said_only_of_levels_above_the_highest_score():
    bounded = normal_table(200, 64, bound=1.0)
    mean, ceilings = bounded.reference_means()[0], {"g": 1.0}
    assert diagnose_feasibility(bounded, problem_with(0.8), None, ceilings).verdict == FEASIBLE
    diagnosis = diagnose_feasibility(bounded, problem_with(1.3), None, ceilings)
    assert diagnosis.verdict == INFEASIBLE and diagnosis.constraints == ("g",)
    assert diagnosis.largest["g"] == pytest.approx(1 - mean)
    assert diagnosis.shortfall["g"] == pytest.approx(0.3 + mean)
    words = diagnosis.sentence()
    assert "lie above the highest score" in words and "lower the level by at least" in words
    for known in (None, {"g": 2.0}):  # a tie at the top of the samples is no evidence
        unknown = diagnose_feasibility(bounded, problem_with(1.3), None, known)
        assert unknown.verdict == NO_EVIDENCE
        assert "better responses may exist" in unknown.sentence()


def test_within_two_standard_errors_of_what_the_samples_support_nothing_is_decided():
    for table in (normal_table(200, 64, bound=1.0), normal_table(200, 64)):
        edge = diagnose_feasibility(table, problem_with(1.0))
        for side in (-1, 1):
            close = edge.largest["g"] + side * edge.se * table.within_std(table.utilities[:, 0])
            assert diagnose_feasibility(table, problem_with(close)).verdict == NEARLY


LAWS = {
    "a rare success": (np.array([0.0, 1.0]), np.array([0.98, 0.02]), 0.3),
    "Likert with a rare 4": (np.arange(5.0), np.array([0.50, 0.30, 0.15, 0.03, 0.02]), 2.5),
}


def drawn(law: str, rng: np.random.Generator) -> ScoreTable:
    values, probabilities, _ = LAWS[law]
    scores = rng.choice(values, p=probabilities, size=(100, 8))
    return ScoreTable.from_arrays(np.zeros((100, 8)), scores[None])


@pytest.mark.parametrize("law", LAWS)
def test_a_rare_success_that_most_prompts_never_show_is_not_called_infeasible(law):
    """100 prompts × 8 responses, most of which show no success: feasible, by laws that give it to
    every prompt."""
    rng, (values, _, margin) = np.random.default_rng(0), LAWS[law]
    for _ in range(100):
        ceilings = {"g": float(values.max())}
        verdict = diagnose_feasibility(
            drawn(law, rng), problem_with(margin), None, ceilings
        ).verdict
        assert verdict not in (INFEASIBLE, FEASIBLE)


@pytest.mark.parametrize("law", LAWS)
def test_a_level_above_the_ceiling_is_found(law):
    rng, (values, probabilities, _) = np.random.default_rng(1), LAWS[law]
    margin, ceilings = values.max() - values @ probabilities + 0.15, {"g": float(values.max())}
    verdicts = [
        diagnose_feasibility(drawn(law, rng), problem_with(margin), None, ceilings).verdict
        for _ in range(100)
    ]
    assert verdicts.count(INFEASIBLE) >= 95


def test_constraints_that_cannot_be_met_together_are_named_and_a_third_is_not():
    """g and −g on two values: each margin 0.5 alone can be met, both cannot; h is free."""
    rng = np.random.default_rng(0)
    g = rng.choice([-1.0, 1.0], size=(1, 100, 40))
    table = ScoreTable.from_arrays(
        rng.normal(size=(100, 40)), np.concatenate([g, rng.normal(size=(1, 100, 40)), -g])
    )
    constraints = tuple(
        Constraint(n, margin=b) for n, b in (("g", 0.5), ("h", 0.1), ("minus", 0.5))
    )
    diagnosis = diagnose_feasibility(table, ConstrainedProblem("r", 1.0, constraints))
    assert diagnosis.verdict == NO_EVIDENCE and diagnosis.together
    assert diagnosis.constraints == ("g", "minus") and "together" in diagnosis.sentence()
    # the sum of both slacks is −1 whatever the policy
    assert diagnosis.shortfall.to_numpy() == pytest.approx([0.5, 0.5], rel=0.02)


def test_the_standard_error_of_the_slack_is_that_of_new_prompts():
    rng = np.random.default_rng(0)
    problem, slacks, errors = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.5),)), [], []
    for _ in range(200):
        utility = rng.normal(size=(1, 60, 8)) * rng.uniform(0.5, 2, size=(1, 60, 1)) + rng.normal(
            size=(1, 60, 1)
        )
        table = ScoreTable.from_arrays(np.zeros((60, 8)), utility)
        diagnosis = diagnose_feasibility(table, problem)
        unit = table.within_std(table.utilities[:, 0])
        slacks.append(diagnosis.slack * unit)
        errors.append(diagnosis.se * unit)
    assert np.mean(errors) == pytest.approx(np.std(slacks), rel=0.15)


def test_weights_and_another_policys_samples_do_not_change_the_limit():
    table = normal_table(100, 32)
    weighted = ScoreTable(
        table.reward,
        table.utilities,
        np.random.default_rng(0).normal(size=len(table.reward)),
        table.starts,
        table.counts,
    )
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", threshold=3.0),))
    one, two = diagnose_feasibility(table, problem), diagnose_feasibility(weighted, problem)
    assert one.largest["g"] == two.largest["g"] and one.slack == two.slack
    given = diagnose_feasibility(table, problem, pd.Series({"g": 3.0}))
    assert given.slack == one.slack and given.largest["g"] == pytest.approx(one.largest["g"])
