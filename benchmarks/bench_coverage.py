"""Do the error bars hold? Replications on enumerable populations of prompts, whose exact u is
known; markdown tables on stdout.

    python -m benchmarks.bench_coverage                 # about half an hour on one core
    python -m benchmarks.bench_coverage --runs 0        # intervals only: two minutes

- Intervals: each replication draws its prompts iid from a population of 5,000 (skewed: a fifth of
  the prompts answers λ three times as strongly), samples π_θ and π_ref, and asks whether the 95 %
  interval of u holds the population's exact u. The last column: the policy is exactly on the
  boundary (u = 0 at λ*), where *satisfied* is a false claim every time.
- Verdicts: whole runs (four rounds, `--round best`) with the exact maximizer as the learner, on 40
  dual and 40 test prompts drawn from the population. *Satisfied* is false where the population's
  exact u of the chosen policy is below 0 for any constraint.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.slack import estimate_subgradient
from constrained_dpo.estimates.verdict import SATISFIED, overall
from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.rounds import play_round
from constrained_dpo.run.steering import chosen_round
from data_prep.errors import UserError
from tests.helpers.rounds import make_run
from tests.helpers.tables import random_world

POPULATION = 5000


def population(m: int) -> TabularWorld:
    """Prompts of two kinds; margins that the exact maximizer meets at a moderate λ."""
    world = random_world(1, m, POPULATION, 40, beta=0.5, margin=0.3)
    strong = (np.arange(POPULATION) % 5 == 0)[:, None]
    utilities = {n: np.where(strong, 3.0 * g, g) for n, g in world.utilities.items()}
    return TabularWorld(world.problem, world.ref_logp, world.reward, utilities)


def subset(world: TabularWorld, rows: np.ndarray) -> TabularWorld:
    return TabularWorld(
        world.problem,
        world.ref_logp[rows],
        world.reward[rows],
        {n: g[rows] for n, g in world.utilities.items()},
    )


def drawn(
    world: TabularWorld, logp: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Scores of `count` responses to every prompt of `rows` (a prompt drawn twice is two
    prompts)."""
    cumulative = np.exp(logp[rows]).cumsum(axis=1)
    which = np.stack([np.searchsorted(row / row[-1], rng.random(count)) for row in cumulative])
    values = {
        n: np.take_along_axis(g[rows], which, axis=1).ravel() for n, g in world.utilities.items()
    }
    return pd.DataFrame({"prompt_id": np.repeat(np.arange(len(rows)), count), **values})


def header(*columns: str) -> None:
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def share(hits: int, total: int) -> str:
    low, high = stats.binomtest(hits, total).proportion_ci(0.95, method="exact")
    return f"{100 * hits / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def intervals(replications: int) -> None:
    header(
        "prompts",
        "responses",
        "m",
        "covered, by constraint (95 % interval of the rate)",
        "'satisfied' on the boundary",
    )
    for m in (1, 3):
        world = population(m)
        logp = world.maximizer(world.optimum.lambda_)
        exact = world.evaluate(logp).u
        for prompts in (30, 1000):
            rng, covered, claimed = (
                np.random.default_rng([m, prompts]),
                dict.fromkeys(world.problem.names, 0),
                0,
            )
            for _ in tqdm(range(replications), desc=f"{prompts} prompts, m = {m}", disable=None):
                rows = rng.integers(POPULATION, size=prompts)
                samples, reference = (
                    drawn(world, table, rows, 8, rng) for table in (logp, world.ref_logp)
                )
                u = estimate_subgradient(samples, reference, world.problem)
                for name, row in u.iterrows():
                    covered[name] += row["low"] <= exact[name] <= row["high"]
                claimed += overall(u) == SATISFIED
            rates = "; ".join(share(hits, replications) for hits in covered.values())
            print(f"| {prompts} | 8 | {m} | {rates} | {share(claimed, replications)} |", flush=True)


def one_run(world: TabularWorld, rng: np.random.Generator) -> tuple[str, bool]:
    """The verdict of a run's best round, and whether the population's exact u is ≥ 0 for every
    constraint."""
    drawn_world = subset(world, rng.integers(POPULATION, size=80))
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "dual.confidence_side=lower",
            "dual.responses_per_prompt=8",
            "sampling.responses_per_prompt=8",
        ]
        run, recipe, learner = make_run(
            Path(folder) / "run", drawn_world, [*settings, f"seed={rng.integers(10**6)}"]
        )
        prompts = [f"p{i}" for i in range(80)]
        learner = TabularLearner(
            drawn_world,
            pd.DataFrame(
                {"prompt_id": prompts, "prompt": "?", "split": ["dual"] * 40 + ["test"] * 40}
            ),
        )
        recipe = prepare(run, recipe, learner, {})
        for _ in range(4):
            play_round(run, recipe, learner)
        return verdict(RunDirectory(run.path), world)


def verdict(run: RunDirectory, world: TabularWorld) -> tuple[str, bool]:
    try:
        record = RoundRecord.read(run.round_file(chosen_round(run, "best")))
    except UserError:
        return "no round satisfied on dual prompts", True
    exact = world.evaluate(world.maximizer(pd.Series(record.lambda_))).u
    return record.verdict, all(u >= 0 for u in exact.values())


def runs(count: int) -> None:
    print()
    header(
        "m",
        "runs",
        "satisfied",
        "undecided",
        "violated",
        "no round satisfied on dual",
        "*satisfied* and false, of all runs",
    )
    for m in (1, 3):
        world, rng = population(m), np.random.default_rng(m)
        played = [
            one_run(world, rng) for _ in tqdm(range(count), desc=f"runs, m = {m}", disable=None)
        ]
        seen = pd.DataFrame(played, columns=["word", "true"])
        words = seen["word"].value_counts()
        cells = [
            words.get(w, 0)
            for w in ("satisfied", "undecided", "violated", "no round satisfied on dual prompts")
        ]
        false = int(((seen["word"] == SATISFIED) & ~seen["true"]).sum())
        print(
            f"| {m} | {count} | {' | '.join(map(str, cells))} | {share(false, count)} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=300)
    arguments = parser.parse_args()
    intervals(arguments.replications)
    if arguments.runs:
        runs(arguments.runs)


if __name__ == "__main__":
    main()
