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
from constrained_dpo.dual.score_files import read_scores
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from tests.helpers.paths import REPO
from tests.helpers.tables import scored_frame


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


@pytest.mark.parametrize("seed", range(60))
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


def test_multipliers_equal_a_root_of_the_gradient_where_the_hessian_is_well_conditioned():
    """λ to 1e-8: L-BFGS-B finds the active set, scipy's hybrid Powell method then solves ∇D = 0 on
    the free multipliers."""
    compared = 0
    for seed in range(120):
        table, problem = random_case(seed)
        oracle, m = Oracle(table, problem), len(problem.names)
        rough = oracle.minimize([np.zeros(m), np.ones(m)], 1e3).x
        held = rough <= 1e-6
        free = ~held & (rough < 1e3)
        if not free.any() or (oracle(rough)[1][held] < 1e-6 * oracle.scale[held]).any():
            continue  # nothing to compare, or the active set is in doubt

        def all_multipliers(part, rough=rough, free=free):
            lam = np.where(free | (rough >= 1e3), rough, 0.0)
            lam[free] = part
            return lam

        def hessian(
            part,
            table=table,
            problem=problem,
            free=free,
            full=all_multipliers,
            levels=oracle.levels,
        ):
            return evaluate_dual(table, full(part), problem.beta, levels).hessian[
                np.ix_(free, free)
            ]

        unit = oracle.scale[free]
        curvature = hessian(rough[free]) / np.outer(unit, unit)
        # Well conditioned: the gradient is known to about 1e-13 of its scale, and that must fix
        # λ to 1e-9.
        smallest = np.linalg.eigvalsh(curvature).min()
        if (
            smallest <= 0
            or 1e-13 / (smallest * unit.min()) > 1e-9
            or np.linalg.cond(curvature) > 1e6
        ):
            continue
        slack = lambda part, full=all_multipliers, oracle=oracle, free=free: oracle(full(part))[1][
            free
        ]
        root = optimize.root(slack, rough[free], jac=hessian, method="hybr", tol=1e-15)
        if np.abs(root.fun / unit).max() > 1e-13:
            continue  # the oracle did not get there
        found = solve_one_shot(table, problem).lambda_.to_numpy()
        np.testing.assert_allclose(
            found, all_multipliers(root.x), atol=1e-8, rtol=1e-8, err_msg=f"seed {seed}"
        )
        compared += 1
    assert compared >= 40


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


def test_number_of_threads_does_not_change_a_bit():
    code = (
        "import numpy as np\nfrom constrained_dpo.dual.scores import ScoreTable\nfrom "
        "constrained_dpo.dual.one_shot import solve_one_shot\n"
        "from constrained_dpo.problem import ConstrainedProblem, Constraint\n"
        "rng = np.random.default_rng(0)\nr = rng.normal(size=(6000, 16))\nu = rng.normal(size=(2, "
        "6000, 16)) - .5 * r\n"
        "p = ConstrainedProblem('r', .1, (Constraint('a', margin=.4), Constraint('b', "
        "margin=.3)))\n"
        "s = solve_one_shot(ScoreTable.from_arrays(r, u), p)\nprint([x.hex() for x in "
        "(*s.lambda_, s.dual_value, s.kl)], s.passes)\n"
    )
    run = lambda threads: (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPO,
            env=os.environ
            | dict.fromkeys(
                ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads
            ),
        ).stdout
    )
    assert run("1") == run("4") and "0x" in run("1")


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


# Weights and files


def weighted_frame(prompts: int = 40, responses: int = 4000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same prompts sampled by π_ref and by another policy q that prefers high g (Gaussian
    scores, exact log-probabilities)."""
    rng = np.random.default_rng(0)
    ids = np.repeat([f"p{i}" for i in range(prompts)], responses)
    shift = np.repeat(rng.normal(size=prompts), responses)
    tables = []
    for mean in (0.0, 0.5):
        z = rng.normal(size=len(ids)) + mean
        frame = pd.DataFrame(
            {"prompt_id": ids, "r": rng.normal(size=len(ids)) - 0.5 * z, "g": z + shift}
        )
        tables.append(frame.assign(sample_logp=-0.5 * (z - mean) ** 2, ref_logp=-0.5 * z**2))
    return tables[0], tables[1]


def test_samples_of_another_policy_are_weighted(tmp_path):
    """λ* and ḡ_ref from weighted samples of q are those of π_ref; unweighted they are not."""
    reference, other = weighted_frame()
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.3),))
    other.assign(source="round:3").to_parquet(tmp_path / "q.parquet")
    read = read_scores(tmp_path / "q.parquet", problem)
    assert "weighted" in read.taken_as
    # Self-normalised: the mean of g under π_ref, to its sampling error (0.004); under q it is
    # 0.5 higher.
    assert read.table.reference_means()[0] == pytest.approx(reference["g"].mean(), abs=0.02)
    weighted, plain = (
        solve_one_shot(read.table, problem),
        solve_one_shot(ScoreTable.from_frame(reference, problem), problem),
    )
    assert weighted.lambda_["g"] == pytest.approx(plain.lambda_["g"], abs=0.03)
    assert weighted.utilities["g"] == pytest.approx(read.table.reference_means()[0] + 0.3, abs=1e-9)
    assert weighted.kl == pytest.approx(plain.kl, abs=0.02)
    absolute = ConstrainedProblem("r", 1.0, (Constraint("g", threshold=0.8),))
    ignored = solve_one_shot(
        read_scores(tmp_path / "q.parquet", absolute, assume_reference=True).table, absolute
    )
    right = solve_one_shot(read_scores(tmp_path / "q.parquet", absolute).table, absolute)
    assert right.lambda_["g"] > ignored.lambda_["g"] + 0.2


def test_which_rows_are_the_reference_policys(tmp_path):
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.1),))
    frame = scored_frame(0, 6, 4)
    logps = {"sample_logp": -3.0, "ref_logp": -2.0}

    def read(table, **options):
        table.to_parquet(tmp_path / "t.parquet")
        table.to_csv(tmp_path / "t.csv", index=False)
        found = [
            read_scores(tmp_path / f"t.{kind}", problem, **options) for kind in ("parquet", "csv")
        ]
        np.testing.assert_array_equal(found[0].table.log_weight, found[1].table.log_weight)
        assert found[0].taken_as == found[1].taken_as
        return found[0]

    def refused(table, match):
        for kind, write in (
            ("parquet", table.to_parquet),
            ("csv", lambda path: table.to_csv(path, index=False)),
        ):
            write(tmp_path / f"bad.{kind}")
            with pytest.raises(UserError, match=match):
                read_scores(tmp_path / f"bad.{kind}", problem)

    assert read(frame.assign(source="reference")).taken_as is None
    assert read(frame.assign(source="reference", **logps)).table.log_weight.max() == 0.0
    assert "taken as the reference policy's" in read(frame).taken_as
    assert read(frame.assign(**logps)).table.log_weight.tolist() == [1.0] * 24
    assert (
        read(
            frame.assign(source=["reference"] * 12 + ["round:1"] * 12, **logps)
        ).table.log_weight.tolist()
        == [1.0] * 24
    )
    mixed = frame.assign(source=["reference"] * 12 + ["dataset"] * 12, **logps)
    mixed.loc[20, "sample_logp"] = np.nan
    refused(mixed, "not the reference policy's.*--assume-reference")
    refused(mixed.drop(columns="source"), "not known in every row.*--assume-reference")
    refused(frame.assign(source=[None] * 24), "not the reference policy's")
    assert "--assume-reference" in read(mixed, assume_reference=True).taken_as
    assert "taken as" in read(frame.assign(sample_logp=np.nan, ref_logp=np.nan)).taken_as


@pytest.mark.parametrize("broken", ["truncated", "nan", "null id", "words", "missing", "empty"])
def test_broken_parquet_files_are_named(broken, tmp_path):
    frame, path = scored_frame(0, 6, 4), tmp_path / "t.parquet"
    match = {
        "nan": "column g is not a finite number in 'y5'",
        "null id": "prompt_id is null in row 3",
        "missing": "missing column g",
    }
    match |= {
        "words": "column g is not a finite number",
        "truncated": "t.parquet: not a readable parquet",
        "empty": "no rows",
    }
    if broken == "nan":
        frame.loc[5, "g"] = np.nan
    elif broken == "null id":
        frame.loc[3, "prompt_id"] = None
    elif broken == "words":
        frame["g"] = "good"
    elif broken == "missing":
        frame = frame.drop(columns="g")
    (frame.head(0) if broken == "empty" else frame).to_parquet(path)
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=match[broken]):
        read_scores(path, ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.1),)))
