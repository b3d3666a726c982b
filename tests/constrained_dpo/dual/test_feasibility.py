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
    unit = utilities.std(axis=1)
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


def test_infeasible_needs_evidence():
    """A bounded utility with many samples at its maximum is infeasible beyond it; an unbounded one
    is only not shown to be feasible."""
    problem = lambda b: ConstrainedProblem("r", 1.0, (Constraint("g", margin=b),))
    bounded, unbounded = normal_table(200, 64, bound=1.0), normal_table(200, 64)
    mean = bounded.reference_means()[0]
    assert diagnose_feasibility(bounded, problem(0.8)).verdict == FEASIBLE
    diagnosis = diagnose_feasibility(bounded, problem(1.3))
    assert diagnosis.verdict == INFEASIBLE and diagnosis.constraints == ("g",) and diagnosis.ess > 8
    assert diagnosis.largest["g"] == pytest.approx(1 - mean) and diagnosis.shortfall[
        "g"
    ] == pytest.approx(0.3 + mean)
    assert (
        "infeasible" in diagnosis.sentence()
        and "lower the level by at least" in diagnosis.sentence()
    )
    diagnosis = diagnose_feasibility(unbounded, problem(4.0))
    assert diagnosis.verdict == NO_EVIDENCE and diagnosis.ess == pytest.approx(1.0)
    assert diagnosis.largest["g"] == pytest.approx(
        unbounded.utilities.reshape(200, 64).max(1).mean() - unbounded.reference_means()[0]
    )
    assert "better responses may exist" in diagnosis.sentence()
    # Within 2 standard errors on either side of what the samples support nothing is decided,
    # whatever the evidence.
    for table in (bounded, unbounded):
        edge = diagnose_feasibility(table, problem(1.0))
        for side in (-1, 1):
            close = edge.largest["g"] + side * edge.se * table.utilities.std()
            assert diagnose_feasibility(table, problem(close)).verdict == NEARLY


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
    assert (
        diagnosis.verdict == INFEASIBLE
        and diagnosis.together
        and diagnosis.constraints == ("g", "minus")
    )
    assert diagnosis.shortfall.to_numpy() == pytest.approx(
        [0.5, 0.5]
    )  # the sum of both slacks is −1 whatever the policy
    assert diagnosis.ess > 10 and "together" in diagnosis.sentence()


def test_the_standard_error_of_the_slack_is_that_of_new_prompts():
    rng = np.random.default_rng(0)
    problem, slacks, errors = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.5),)), [], []
    for _ in range(200):
        utility = rng.normal(size=(1, 60, 8)) * rng.uniform(0.5, 2, size=(1, 60, 1)) + rng.normal(
            size=(1, 60, 1)
        )
        table = ScoreTable.from_arrays(np.zeros((60, 8)), utility)
        diagnosis = diagnose_feasibility(table, problem)
        slacks.append(diagnosis.slack * utility.std())
        errors.append(diagnosis.se * utility.std())
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
