"""The one-shot dual against independent oracles: scipy's optimizers and linear programs, and a
second way to every figure."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special

from constrained_dpo.dual.function import evaluate_dual, prompt_terms
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.paths import REPO


def random_case(seed: int) -> tuple[ScoreTable, ConstrainedProblem]:
    """1 to 200 prompts, 1 to 32 responses (ragged or not), m ≤ 5, scores up to ±1e3, β 0.01 to 10,
    ties, slack constraints."""
    rng = np.random.default_rng(seed)
    prompts, m = int(rng.choice([1, 2, 5, 30, 200])), int(rng.integers(1, 6))
    scale, beta = float(rng.choice([1, 10, 1e3])), float(rng.choice([0.01, 0.1, 1, 10]))
    counts = (
        rng.integers(1, 33, prompts)
        if rng.random() < 0.6
        else np.full(prompts, int(rng.choice([1, 4, 32])))
    )
    reward = rng.normal(size=counts.sum())
    offset = rng.normal(size=(m, 1)) * rng.integers(0, 2, size=(m, 1))
    utilities = (-0.5 * reward + 0.8 * rng.normal(size=(m, len(reward))) + offset) * rng.choice(
        [1, scale], size=(m, 1)
    )
    if rng.random() < 0.4:
        reward, utilities = np.round(2 * reward) / 2, np.round(utilities)  # ties
    table = ScoreTable.from_columns(
        np.repeat(np.arange(prompts), counts), reward * scale, utilities
    )
    margins = rng.choice([-0.5, 0.0, 0.3, 0.3, 0.3], size=m) * utilities.std(
        axis=1
    )  # a negative one is slack
    return table, ConstrainedProblem(
        "r", beta, tuple(Constraint(f"g{i}", margin=b) for i, b in enumerate(margins))
    )


class Oracle:
    """D and its gradient written independently: padded arrays, scipy's logsumexp."""

    def __init__(self, table: ScoreTable, problem: ConstrainedProblem) -> None:
        shape = (len(table.counts), table.counts.max())
        here = np.arange(shape[1]) < table.counts[:, None]
        self.reward, self.utilities = np.zeros(shape), np.zeros((len(problem.names), *shape))
        self.reward[here], self.utilities[:, here] = table.reward, table.utilities.T
        self.log_mean_of_one = np.where(here, -np.log(table.counts)[:, None], -np.inf)
        self.levels = (self.utilities.sum(2) / table.counts).mean(1) + problem.bounds.to_numpy()
        self.beta, self.scale = problem.beta, 1 + np.abs(table.utilities).max(axis=0)

    def __call__(self, lam: np.ndarray) -> tuple[float, np.ndarray]:
        exponent = (
            self.reward + np.tensordot(lam, self.utilities, 1)
        ) / self.beta + self.log_mean_of_one
        weight = special.softmax(exponent, axis=1)
        gradient = (weight * self.utilities).sum(2).mean(1) - self.levels
        return self.beta * special.logsumexp(exponent, axis=1).mean() - lam @ self.levels, gradient

    def minimize(self, starts: list[np.ndarray], max_lambda: float) -> optimize.OptimizeResult:
        bounds, options = (
            [(0, max_lambda)] * len(self.levels),
            {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 2000},
        )
        return min(
            (
                optimize.minimize(
                    self, s, jac=True, bounds=bounds, method="L-BFGS-B", options=options
                )
                for s in starts
            ),
            key=lambda f: f.fun,
        )


@pytest.mark.parametrize(
    "seed", [*range(40), *(pytest.param(s, marks=pytest.mark.slow) for s in range(40, 60))]
)
def test_minimum_on_random_tables(seed):
    table, problem = random_case(seed)
    m, oracle = len(problem.names), Oracle(table, problem)
    solution = solve_one_shot(table, problem)
    assert solution.kkt_residual <= 1e-8 * oracle.scale.max()
    lam = solution.lambda_.to_numpy()
    value, gradient = oracle(lam)
    residual = np.where(
        (lam <= 0) & (gradient > 0) | (lam >= 1e3) & (gradient < 0), 0.0, np.abs(gradient)
    )
    assert (residual <= 1e-8 * oracle.scale).all()  # by the oracle's gradient too
    starts = [
        np.zeros(m),
        np.ones(m),
        np.random.default_rng(seed).uniform(0, 10, m),
        lam * 0.9 + 0.01,
    ]
    # 1e-10, in units of max(1, |D|): at |D| = 1e5 neighbouring floats are 1.5e-11 apart.
    assert value <= oracle.minimize(starts, 1e3).fun + 1e-10 * max(1.0, abs(value))
    assert solution.dual_value == pytest.approx(value, rel=1e-12, abs=1e-12)


def free_root(table, problem, oracle) -> np.ndarray | None:
    """λ from an active set that L-BFGS-B finds and a root of ∇D on the free multipliers; None where
    there is nothing to compare, the active set is in doubt, or λ is not fixed to 1e-9."""
    m = len(problem.names)
    rough = oracle.minimize([np.zeros(m), np.ones(m)], 1e3).x
    held = rough <= 1e-6
    free = ~held & (rough < 1e3)
    if not free.any() or (oracle(rough)[1][held] < 1e-6 * oracle.scale[held]).any():
        return None

    def full(values):
        lam = np.where(free | (rough >= 1e3), rough, 0.0)
        lam[free] = values
        return lam

    def hessian(values):
        point = evaluate_dual(table, full(values), problem.beta, oracle.levels)
        return point.hessian[np.ix_(free, free)]

    unit = oracle.scale[free]
    curvature = hessian(rough[free]) / np.outer(unit, unit)
    # Well conditioned: the gradient is known to about 1e-13 of its scale, and that must fix
    # λ to 1e-9.
    smallest = np.linalg.eigvalsh(curvature).min()
    if smallest <= 0 or 1e-13 / (smallest * unit.min()) > 1e-9 or np.linalg.cond(curvature) > 1e6:
        return None
    slack = lambda values: oracle(full(values))[1][free]
    root = optimize.root(slack, rough[free], jac=hessian, method="hybr", tol=1e-15)
    # else the oracle did not get there
    return full(root.x) if np.abs(root.fun / unit).max() <= 1e-13 else None


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 120), marks=pytest.mark.slow)], ids=["40", "more"]
)
def test_multipliers_equal_a_root_of_the_gradient_where_the_hessian_is_well_conditioned(seeds):
    """λ to 1e-8: L-BFGS-B finds the active set, scipy's hybrid Powell method then solves ∇D = 0 on
    the free multipliers."""
    compared = 0
    for seed in seeds:
        table, problem = random_case(seed)
        root = free_root(table, problem, Oracle(table, problem))
        if root is not None:
            lam = solve_one_shot(table, problem).lambda_.to_numpy()
            np.testing.assert_allclose(lam, root, atol=1e-8, rtol=1e-8, err_msg=f"seed {seed}")
            compared += 1
    assert compared >= len(seeds) // 2


@pytest.mark.parametrize("ragged", [False, True])
def test_block_size_layout_and_order_of_prompts_do_not_change_a_bit(ragged):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, 300) if ragged else np.full(300, 24)
    reward, utilities = rng.normal(size=counts.sum()), rng.normal(size=(3, counts.sum()))
    codes, lam = np.repeat(np.arange(300), counts), np.array([0.3, 0.0, 1.1])
    table = ScoreTable.from_columns(codes, reward, utilities)
    by_row = ScoreTable(
        reward, np.ascontiguousarray(utilities.T), np.zeros(len(reward)), table.starts, table.counts
    )
    reference = prompt_terms(table, lam, 0.1)
    others = [prompt_terms(table, lam, 0.1, block) for block in (1, 37, 1000, 10**6)] + [
        prompt_terms(by_row, lam, 0.1)
    ]
    for other in others:
        for name in ("log_mean", "reward", "utilities", "covariance", "ess"):
            np.testing.assert_array_equal(getattr(other, name), getattr(reference, name))
    shuffled = rng.permutation(len(codes))
    mixed = ScoreTable.from_columns(codes[shuffled], reward[shuffled], utilities[:, shuffled])
    levels = np.full(3, 0.2)
    assert mixed.counts.tolist() == table.counts.tolist()
    assert evaluate_dual(mixed, lam, 0.1, levels).value == pytest.approx(
        reference.point(levels).value, rel=1e-14
    )


THREADED = """
import numpy as np
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.problem import ConstrainedProblem, Constraint

rng = np.random.default_rng(0)
reward = rng.normal(size=(6000, 16))
utilities = rng.normal(size=(2, 6000, 16)) - 0.5 * reward
constraints = (Constraint("a", margin=0.4), Constraint("b", margin=0.3))
table = ScoreTable.from_arrays(reward, utilities)
s = solve_one_shot(table, ConstrainedProblem("r", 0.1, constraints))
print([x.hex() for x in (*s.lambda_, s.dual_value, s.kl)], s.passes)
"""


def test_number_of_threads_does_not_change_a_bit():
    def run(threads: str) -> str:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        command = [sys.executable, "-c", THREADED]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=REPO, env=environment
        )
        return done.stdout

    one = run("1")
    assert one == run("4") and "0x" in one


def test_a_large_table_takes_at_most_ten_passes_and_starts_do_not_matter():
    rng = np.random.default_rng(1)
    reward = rng.normal(size=(8000, 16))
    table = ScoreTable.from_arrays(reward, -0.6 * reward + 0.8 * rng.normal(size=(2, 8000, 16)))
    for beta in (0.01, 0.1, 1.0, 10.0):
        problem = ConstrainedProblem(
            "r", beta, (Constraint("a", margin=0.4), Constraint("b", threshold=0.2))
        )
        solution = solve_one_shot(table, problem)
        assert solution.passes <= 10 and solution.kkt_residual < 1e-11
        far = solve_one_shot(table, problem, start=pd.Series({"b": 500.0, "a": 900.0}))
        pd.testing.assert_series_equal(far.lambda_, solution.lambda_, atol=1e-9, rtol=1e-9)
