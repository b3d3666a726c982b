"""`make bench-one-shot`: the one-shot dual at 30,000 prompts × 128 responses; markdown tables on
stdout.

Every measurement runs in a process of its own, one thread. Seconds are CPU seconds of the solver
alone, which other load on the machine changes less than wall seconds; the peak is the process's
largest resident memory while it solves, the scores included. Beside ours:

- MoCAN: projected gradient descent as in the authors' released code (github.com/shuoli90/CAN,
  `DualOptimizer`), in numpy with scipy's softmax as there: λ starts at 1, step 1, at most 200
  iterations, until λ moved less than 1e-5 over the last 5 of at least 11; else again with step 1/2,
  1/8, 1/64, 1/1024. One constraint. The released code also computes the objective and the means in
  every iteration, which is left out here, in its favour. "Last step only" counts from the start of
  the descent that converged, as if its step size had been given.
- scipy's L-BFGS-B from λ = 0 with the analytic gradient, once on our evaluation of D, once on plain
  numpy; at scipy's own tolerances (ftol 2.2e-9, gtol 1e-5) and at tight ones (1e-15, 1e-10).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from constrained_dpo.dual.function import evaluate_dual
from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.score_files import read_scores
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint

SCALES = {"std 1, β 0.25": (1.0, 0.25), "std 10, β 0.1": (10.0, 0.1)}
TOLERANCES = {"default": {}, "tight": {"ftol": 1e-15, "gtol": 1e-10}}
LBFGSB = [
    "L-BFGS-B default, our D",
    "L-BFGS-B tight, our D",
    "L-BFGS-B default, plain numpy",
    "L-BFGS-B tight, plain numpy",
]
METHODS = {1: ["ours", "MoCAN", *LBFGSB], 2: ["ours", *LBFGSB]}


def make_scores(folder: Path, seed: int, scale: float, prompts: int, responses: int) -> None:
    """Gaussian scores; every utility is negatively correlated with the reward, and prompts differ
    in level."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, responses)) + 0.5 * rng.normal(size=(prompts, 1))
    utilities = np.stack([-0.6 * reward + 0.8 * rng.normal(size=reward.shape) for _ in range(2)])
    np.save(folder / "reward.npy", scale * reward)
    np.save(folder / "utilities.npy", scale * utilities)
    ids = pa.array([f"prompt-{i:06d}" for i in range(prompts)]).take(
        pa.array(np.repeat(np.arange(prompts), responses))
    )
    columns = {
        n: scale * v.reshape(-1)
        for n, v in zip(("r", "g1", "g2"), (reward, *utilities), strict=True)
    }
    pq.write_table(
        pa.table({"prompt_id": ids, **columns}), folder / "scores.parquet", compression="zstd"
    )


def problem_of(scale: float, beta: float, m: int) -> ConstrainedProblem:
    margins = (0.4 * scale, 0.2 * scale)[:m]
    return ConstrainedProblem(
        "r", beta, tuple(Constraint(f"g{i + 1}", margin=b) for i, b in enumerate(margins))
    )


def mocan(
    reward: np.ndarray, utility: np.ndarray, beta: float, margin: float
) -> tuple[list[float], int, int, float]:
    """λ, the iterations over all step sizes tried, those of the last, and its seconds; arrays
    (num_prompts, num_responses)."""
    from scipy.special import softmax

    threshold = utility.mean() + margin
    step, total = 1.0, 0
    for loop in range(5):
        step, lam, path, start = step / 2**loop, 1.0, [], time.process_time()
        for iteration in range(200):
            weight = softmax((reward + (utility - threshold) * lam) / beta, axis=1)
            gradient = np.sum(weight * (utility - threshold), axis=1).mean()
            lam, total = max(lam - step * gradient, 0.0), total + 1
            path.append(lam)
            if iteration >= 10 and max(abs(lam - p) for p in path[-5:]) < 1e-5:
                return [lam], total, iteration + 1, time.process_time() - start
    return [float("nan")], total, 200, time.process_time() - start


def lbfgsb(table: ScoreTable, problem: ConstrainedProblem, method: str) -> tuple[list[float], int]:
    from scipy import optimize

    shape, m = (len(table.counts), table.counts[0]), len(problem.names)
    levels = table.reference_means() + problem.bounds.to_numpy()
    reward, utilities = table.reward.reshape(shape), table.utilities.T.reshape(m, *shape)

    def ours(lam: np.ndarray) -> tuple[float, np.ndarray]:
        point = evaluate_dual(table, lam, problem.beta, levels)
        return point.value, point.gradient

    def plain(lam: np.ndarray) -> tuple[float, np.ndarray]:
        exponent = (reward + sum(v * g for v, g in zip(lam, utilities, strict=True))) / problem.beta
        top = exponent.max(axis=1, keepdims=True)
        weight = np.exp(exponent - top)
        total = weight.sum(axis=1, keepdims=True)
        gradient = (
            np.array([((weight * g).sum(axis=1, keepdims=True) / total).mean() for g in utilities])
            - levels
        )
        return problem.beta * (top + np.log(total / shape[1])).mean() - lam @ levels, gradient

    options = TOLERANCES["tight" if "tight" in method else "default"]
    function = ours if "our D" in method else plain
    best = optimize.minimize(
        function, np.zeros(m), jac=True, bounds=[(0, 1e3)] * m, method="L-BFGS-B", options=options
    )
    return best.x.tolist(), best.nfev


def measure(folder: Path, method: str, scale: float, beta: float, m: int) -> dict[str, object]:
    """One measurement, in this process."""
    import scipy.optimize
    import scipy.special  # noqa: F401

    problem = problem_of(scale, beta, m)
    if method != "file":
        reward = np.load(folder / "reward.npy")
        utilities = np.load(folder / "utilities.npy", mmap_mode="r")[:m].copy()
        table = ScoreTable.from_arrays(reward, utilities)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, more = time.process_time(), {}
    if method == "MoCAN":
        lam, passes, last, last_seconds = mocan(
            reward, utilities[0], beta, float(problem.bounds.iloc[0])
        )
        more = {"last_passes": last, "last_seconds": last_seconds}
    elif method.startswith("L-BFGS-B"):
        lam, passes = lbfgsb(table, problem, method)
    else:
        if method == "file":
            table = read_scores(folder / "scores.parquet", problem).table
            more = {"read": time.process_time() - start}
        solution = solve_one_shot(table, problem)
        lam, passes = solution.lambda_.tolist(), solution.passes
    seconds = time.process_time() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return more | {
        "seconds": seconds,
        "passes": passes,
        "lambda": lam,
        "peak": int(status["VmHWM"].split()[0]) / 1024,
    }


def bootstrap_coverage(prompts: int, replications: int, seed: int) -> tuple[float, float]:
    """Share of 95 % bootstrap intervals (200 resamples) of λ* that cover the law's λ*, and the mean
    width; prompts of two kinds with 8 responses each, whose scores within a prompt are normal."""
    from constrained_dpo.dual.sensitivity import bootstrap_multipliers

    rng = np.random.default_rng(seed)
    problem = ConstrainedProblem("r", 0.5, (Constraint("g", margin=0.3),))
    # E[g] under the maximizer rises by (Cov(g, r) + λ Var(g))/β: covariance −0.6, variance 1
    truth, covered, widths = 0.3 * 0.5 + 0.6, 0, []
    for _ in range(replications):
        level = rng.choice([-0.7, 0.7], size=(prompts, 1))
        reward = rng.normal(size=(prompts, 8))
        utility = -0.6 * reward + 0.8 * rng.normal(size=reward.shape)
        table = ScoreTable.from_arrays(reward + level, (utility + level)[None])
        interval = bootstrap_multipliers(table, problem, 200, rng).interval
        low, high = interval.loc["g", ["low", "high"]]
        covered += low <= truth <= high
        widths.append(high - low)
    return covered / replications, float(np.mean(widths))


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and 95 % t-interval over seeds."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    half = (
        stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        if len(values) > 1
        else float("nan")
    )
    return (
        f"{values.mean():.{digits}f} [{values.mean() - half:.{digits}f}, "
        f"{values.mean() + half:.{digits}f}]"
    )


def child(*arguments: object) -> dict:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", __spec__.name, "--one", *map(str, arguments)]
    return json.loads(
        subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | threads
        ).stdout
    )


def print_table(m: int, label: str, results: dict[str, list[dict]]) -> None:
    ours = results["ours"]
    print(f"\n{label}, m = {m}\n")
    print(
        "| method | passes | seconds | times ours | λ error | peak, MB |\n|---|---|---|---|---|---|"
    )
    for method, runs in results.items():
        passes = sorted({r["passes"] for r in runs})
        errors = [
            np.max(np.abs(np.subtract(r["lambda"], o["lambda"])))
            for r, o in zip(runs, ours, strict=True)
        ]
        ratio = (
            "1"
            if method == "ours"
            else spread([r["seconds"] / o["seconds"] for r, o in zip(runs, ours, strict=True)], 1)
        )
        error = (
            "–"
            if method == "ours"
            else "did not converge"
            if np.isnan(errors).any()
            else f"{max(errors):.0e}"
        )
        cells = [
            method,
            f"{passes[0]}–{passes[-1]}" if passes[1:] else str(passes[0]),
            spread([r["seconds"] for r in runs]),
            ratio,
            error,
        ]
        print("| " + " | ".join([*cells, f"{max(r['peak'] for r in runs):.0f}"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=30_000)
    parser.add_argument("--responses", type=int, default=128)
    parser.add_argument(
        "--coverage", action="store_true", help="coverage of the bootstrap interval instead"
    )
    parser.add_argument("--replications", type=int, default=400, help="of --coverage")
    parser.add_argument(
        "--one", nargs=5, metavar=("FOLDER", "METHOD", "SCALE", "BETA", "M"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.one:
        folder, method, scale, beta, m = arguments.one
        print(json.dumps(measure(Path(folder), method, float(scale), float(beta), int(m))))
        return
    if arguments.coverage:
        print("| prompts | 95 % intervals that cover λ* | mean width |\n|---|---|---|")
        for prompts in (30, 100, 1000):
            count = arguments.replications
            covered, width = bootstrap_coverage(prompts, count, seed=0)
            print(
                f"| {prompts} | {100 * covered:.1f} % ± "
                f"{100 * 1.96 * np.sqrt(covered * (1 - covered) / count):.1f} % | {width:.3f} |",
                flush=True,
            )
        return
    print(
        f"{arguments.prompts} prompts × {arguments.responses} responses, seeds {arguments.seeds}; "
        "mean [95 % interval] over seeds"
    )
    results: dict[tuple, list[dict]] = {}
    for label, (scale, beta) in SCALES.items():
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                make_scores(Path(folder), seed, scale, arguments.prompts, arguments.responses)
                tasks = [(m, method) for m, methods in METHODS.items() for method in methods] + [
                    (2, "file")
                ]
                for m, method in tasks:
                    results.setdefault((label, m, method), []).append(
                        child(folder, method, scale, beta, m)
                    )
        for m, methods in METHODS.items():
            rows = {method: results[label, m, method] for method in methods}
            if "MoCAN" in rows:
                last_steps = [
                    r | {"passes": r["last_passes"], "seconds": r["last_seconds"]}
                    for r in rows["MoCAN"]
                ]
                rows = {
                    "ours": rows["ours"],
                    "MoCAN": rows["MoCAN"],
                    "MoCAN, last step only": last_steps,
                } | rows
            print_table(m, label, rows)
        runs = results[label, 2, "file"]
        print(
            "\nFrom a parquet file (prompt_id strings, three float columns), m = 2: reading "
            f"{spread([r['read'] for r in runs])} s, "
            f"with solving {spread([r['seconds'] for r in runs])} s, peak "
            f"{max(r['peak'] for r in runs):.0f} MB"
        )


if __name__ == "__main__":
    main()
