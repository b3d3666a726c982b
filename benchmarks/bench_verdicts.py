"""What decides verdicts, by simulation; markdown tables on stdout.

    python -m benchmarks.bench_verdicts laws            # feasibility, first multipliers, rounds
    python -m benchmarks.bench_verdicts variance RUN…   # of estimates from a run's own samples
    python -m benchmarks.bench_verdicts certificate FILE.jsonl   # of bench_quality's records

laws: false and found *infeasible*; λ_0's error with few responses, before (all prompts, as they
are) and after (the richest prompts, corrected); rounds to |u| < 5 % of b where prompts differ,
with steps in units of the total and of the within-prompt spread. variance: of KL, reward and u
over draws of 8 responses from a run's many. certificate: in how many recorded rounds there is an
estimate, an interval, and in how many they cover the exact gap.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, special

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.dual.feasibility import INFEASIBLE, diagnose_feasibility
from constrained_dpo.dual.one_shot import first_multipliers, solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.steps import auto_step_scale, dual_step
from constrained_dpo.estimates.kl import controlled, kl_values, log_ratio, path_noise
from constrained_dpo.estimates.mixed_means import mixed_means
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.run.directory import RunDirectory
from data_prep.readers.tables import read_parquet
from tests.helpers.tables import random_world

REPETITIONS = 100


def header(*columns: str) -> None:
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def problem_of(margin: float, beta: float = 1.0) -> ConstrainedProblem:
    return ConstrainedProblem("r", beta, (Constraint("g", margin=margin),))


def feasibility() -> None:
    """100 prompts × 8 responses of laws that give every answer to every prompt: a level under the
    highest score is feasible, one above it is not."""
    laws = {
        "indicator, π_ref(g = 1) = 2 %": (np.array([0.0, 1.0]), np.array([0.98, 0.02])),
        "indicator, 50 %": (np.array([0.0, 1.0]), np.array([0.5, 0.5])),
        "Likert, a rare 4": (np.arange(5.0), np.array([0.50, 0.30, 0.15, 0.03, 0.02])),
    }
    header("law", "level − highest score", "called infeasible, of 100")
    for place, (name, (values, probabilities)) in enumerate(laws.items()):
        mean = float(values @ probabilities)
        for beyond in (-0.7, -0.1, 0.05, 0.1, 0.3):
            margin, hits = values.max() + beyond - mean, 0
            rng = np.random.default_rng([place, 7])
            for _ in range(REPETITIONS):
                scores = rng.choice(values, p=probabilities, size=(100, 8))
                table = ScoreTable.from_arrays(np.zeros((100, 8)), scores[None])
                ceilings = {"g": float(values.max())}
                found = diagnose_feasibility(table, problem_of(margin), None, ceilings).verdict
                hits += found == INFEASIBLE
            print(f"| {name} | {beyond:+g} | {hits} |", flush=True)


def first() -> None:
    """λ_0 on samples of one law of 400 answers that all prompts share, β 0.25 and 0.5."""
    header("β", "prompts × responses", "exact λ*", "all as they are", "corrected", "at the bound")
    for beta in (0.25, 0.5):
        problem, law = problem_of(0.5, beta), np.random.default_rng(3).normal(size=(2, 400))
        reward, utility = 0.5 * law[0], law[1] - 0.3 * law[0]

        def slack(lam: float, r=reward, g=utility, beta=beta) -> float:
            return float(special.softmax((r + lam * g) / beta) @ g - g.mean() - 0.5)

        exact = optimize.brentq(slack, 0, 20)
        tables = {
            "300 × 8": np.full(300, 8),
            "300 × 16": np.full(300, 16),
            "300 × 32": np.full(300, 32),
            "100 × 64": np.full(100, 64),
            "400 × 4 and 100 × 64": np.r_[np.full(400, 4), np.full(100, 64)],
        }
        for name, counts in tables.items():
            rows = []
            for seed in range(20):
                chosen = np.random.default_rng(seed).integers(400, size=counts.sum())
                prompts = np.repeat(np.arange(len(counts)), counts)
                table = ScoreTable.from_columns(prompts, reward[chosen], utility[chosen][None])
                ours, plain = first_multipliers(table, problem), solve_one_shot(table, problem)
                rows.append((plain.lambda_["g"], ours.lambda_["g"], bool(ours.replaced)))
            mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
            cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean[:2], spread[:2], strict=True)]
            print(f"| {beta} | {name} | {exact:.3f} | {cells[0]} | {cells[1]} | {mean[2]:.0%} |")


def rounds() -> None:
    """The exact maximizer on 30 worlds of 40 prompts; their prompts differ in reward by a std of 3,
    within a prompt it is 1. Step size 0.5 (in the unit), λ_0 = 0, b = 0.4."""
    header("unit of the step", "rounds to u within 5 %, median", "never in 20, of 30", "flips of u")
    for name in ("total spread", "spread within prompts"):
        arrived, flips = [], []
        for seed in range(30):
            plain = random_world(seed, 1, prompts=40, responses=60)
            shift = 3 * np.random.default_rng(seed + 100).normal(size=(40, 1))
            world = TabularWorld(
                plain.problem, plain.ref_logp, plain.reward + shift, plain.utilities
            )
            scale = auto_step_scale(world.score_table, world.problem)
            if name == "total spread":
                scale[:] = world.reward.std() / world.utilities["g0"].var()
            lam, slacks = pd.Series({"g0": 0.0}), []
            for _ in range(20):
                u = world.evaluate(world.maximizer(lam)).u
                slacks.append(u["g0"])
                lam = dual_step(lam, pd.Series(u), 0.5 * scale, 50.0)
            close = np.flatnonzero(np.abs(slacks) < 0.05 * 0.4)
            arrived.append(close[0] if len(close) else np.inf)
            flips.append(int((np.diff(np.sign(slacks)) != 0).sum()))
        median, never = np.median(arrived), int(np.isinf(arrived).sum())
        print(f"| {name} | {median:g} | {never} | {np.median(flips):g} of 19 |", flush=True)


def variance(folders: list[Path]) -> None:
    """Variance over draws of 8 responses of each law to each dual prompt, new estimate over
    old."""
    names = ("KL estimate", "E[r] controlled", "E[g] with π_ref's samples", "u with them")
    header("run", "round", "KL", *names)
    for folder in folders:
        run = RunDirectory(folder)
        recipe, reference = run.recipe(), read_parquet(run.reference_file)
        for number in range(run.rounds_done()):
            samples = read_parquet(run.samples_file(number)).query("split == 'dual'")
            logps = read_parquet(run.off_policy_file(number))
            off_policy = reference.drop(columns="policy_logp").merge(
                logps, on=["prompt_id", "response_id"]
            )
            kl = float(kl_values(samples).mean())
            ratios = _ratios(samples, off_policy, recipe.problem)
            cells = " | ".join(f"{ratio:.2g}" for ratio in ratios)
            print(f"| {folder.name} | {number} | {kl:.2f} | {cells} |", flush=True)


def _ratios(
    samples: pd.DataFrame, off_policy: pd.DataFrame, problem: ConstrainedProblem
) -> list[float]:
    rng, draws = np.random.default_rng(0), []
    (name,) = problem.names
    for _ in range(200):
        few, of_reference = (
            table.sample(frac=1, random_state=rng).groupby("prompt_id").head(8)
            for table in (samples, off_policy)
        )
        prompts, noise = few["prompt_id"], path_noise(few)
        mixed = mixed_means(few, of_reference, [name])[name].mean()
        pairs = [
            (log_ratio(few), kl_values(few)),
            (few[problem.reward], controlled(few[problem.reward], noise, prompts)),
        ]
        row = [tuple(v.groupby(prompts).mean().mean() for v in pair) for pair in pairs]
        plain, level = few[name].mean(), of_reference[name].mean()
        draws.append([*row, (plain, mixed), (plain - level, mixed - level)])
    spread = np.var(np.array(draws), axis=0)  # (estimates, old and new)
    return (spread[:, 1] / spread[:, 0]).tolist()


def certificate(file: Path) -> None:
    """Rounds of `bench_quality`'s records with an estimate, an interval with both ends, and how
    many of each cover the exact gap (the estimate with two standard errors)."""
    rows = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        scale = record["task"][2]
        for entry in record["rounds"]:
            low, high = entry["lagrangian_gap_low"], entry["lagrangian_gap_high"]
            estimate, exact = entry["lagrangian_gap"], entry["exact_gap"]
            error = 2 * (entry["lagrangian_gap_se"] or 0.0)
            rows.append(
                {
                    "scale": scale,
                    "estimate": estimate is not None,
                    "estimate covers": estimate is not None and abs(estimate - exact) <= error,
                    "interval": high is not None,
                    "low end holds": low <= exact,
                    "interval covers": high is not None and low <= exact <= high,
                    "high end within twice": high is not None and high <= 2 * exact,
                    "low share": low / exact,
                    "high share": np.nan if high is None else high / exact,
                }
            )
    table = pd.DataFrame(rows)
    header("scale", "rounds", "estimates", "of them cover", "finite intervals", "of them cover",
           "low end holds", "high end at most twice the exact gap", "low end / exact gap, median",
           "high end / exact gap, median")  # fmt: skip
    for scale, group in table.groupby("scale"):
        count = {c: int(group[c].sum()) for c in group.columns[1:-2]}
        print(
            f"| {scale} | {len(group)} | {count['estimate']} | {count['estimate covers']} | "
            f"{count['interval']} | {count['interval covers']} | {count['low end holds']} | "
            f"{count['high end within twice']} | {group['low share'].median():.2g} | "
            f"{group['high share'].median():.2g} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["laws", "variance", "certificate"])
    parser.add_argument("paths", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "laws":
        feasibility()
        first()
        rounds()
    elif arguments.what == "variance":
        variance(arguments.paths)
    else:
        certificate(*arguments.paths)
