"""`make bench-theory`: docs/theory.md in numbers: inequalities, rates in ν, one-shot against
multi-shot over margins; markdown tables.

    python -m benchmarks.bench_theory --output docs/figures   # everything, 4 minutes on one core
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, stats

from benchmarks.theory_figures import draw_geometry, draw_margins, draw_rates
from constrained_dpo.dual.exact import TabularWorld
from tests.helpers.restricted_families import (
    Family,
    LogLinearFamily,
    MixtureFamily,
    family_dual,
    minimize_family_dual,
    objective_and_slack,
    scaled_world,
    with_margin,
)
from tests.helpers.theory_checks import Row, Solved, gaps, inequality_rows, slope, solve, summarize

EPSILONS = np.logspace(-3, -0.5, 11)
NUS = np.logspace(-2, np.log10(1.5), 8)
MARGINS = np.array([0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0])
SETTINGS = {
    "ε-mixtures, score std 1, β 0.5": ("mixture", 1.0, 0.5),
    "ε-mixtures, score std 10, β 0.1": ("mixture", 10.0, 0.1),
    "log-linear, score std 1, β 0.5": ("log-linear", 1.0, 0.5),
}


def world_of(kind: str, seed: int, num_constraints: int, std: float, beta: float) -> TabularWorld:
    shape = (
        {"prompts": 12, "responses": 200} if kind == "mixture" else {"prompts": 8, "responses": 60}
    )
    return scaled_world(seed, num_constraints, std, beta, **shape)


def families(kind: str, world: TabularWorld, seed: int) -> list[Family]:
    """One world's chain of families of growing ν."""
    if kind == "mixture":
        return [MixtureFamily(world, e) for e in EPSILONS]
    return [LogLinearFamily.with_gap(world, nu, seed) for nu in NUS]


def primal_by_slsqp(solved: Solved, seed: int) -> float:
    """P_p* of a log-linear family, by SLSQP on θ from several starts: the best feasible objective,
    score units."""
    family, world = solved.family, solved.family.world
    rng, aim = np.random.default_rng(seed), family.best_theta(solved.best.lam)

    def values(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return objective_and_slack(world, family.policy(theta))

    feasible = []
    for start in (aim + rng.normal(size=aim.shape), np.zeros_like(aim)):
        run = optimize.minimize(
            lambda t: -values(t)[0],
            start,
            method="SLSQP",
            constraints={"type": "ineq", "fun": lambda t: values(t)[1]},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        if values(run.x)[1].min() >= -1e-8:
            feasible.append(-run.fun)
    return max(feasible, default=float("-inf"))


def measure(
    kind: str, std: float, beta: float, worlds: int
) -> tuple[list[tuple[Row, float]], pd.DataFrame]:
    """Inequality rows, and the gaps by (m, seed, ν)."""
    rows, table = [], []
    for m in (1, 2):
        for seed in range(worlds):
            world = world_of(kind, seed, m, std, beta)
            for family in families(kind, world, seed):
                solved = solve(family)
                rows += [(row, std) for row in inequality_rows(solved)]
                if kind == "log-linear":
                    # SLSQP may leave the constraint violated by 1e-8, which the multipliers
                    # price.
                    primal = primal_by_slsqp(solved, seed) - 1e-8 * float(solved.best.lam.sum())
                    rows.append(
                        (
                            Row(
                                "weak duality: P_p* (SLSQP) ≤ D_p*", primal, solved.best.dual_value
                            ),
                            std,
                        )
                    )
                bound = family.constant(solved.best.lam) * family.nu
                table.append(
                    {"m": m, "seed": seed, "nu": family.nu, "bound": bound, **gaps(solved)}
                )
    return rows, pd.DataFrame(table)


def slopes(table: pd.DataFrame, std: float) -> pd.DataFrame:
    """By quantity: median log-log slope over worlds, its 95 % interval (Student's t on the mean),
    the smallest, and how many worlds."""
    rows = []
    for column in table.columns.difference(["m", "seed", "nu", "bound"], sort=False):
        by_world = [
            slope(g["nu"].to_numpy(), g[column].to_numpy(), 1e-11 * std)
            for _, g in table.groupby(["m", "seed"])
        ]
        values = np.array([v for v in by_world if np.isfinite(v)])
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        rows.append(
            {
                "quantity": column,
                "theorem": "1" if column.startswith("primal-dual") else "1/2",
                "mean slope [95 %]": f"{values.mean():.2f} [{values.mean() - half:.2f}, "
                f"{values.mean() + half:.2f}]",
                "smallest": f"{values.min():.3f}",
                "worlds": f"{len(values)}",
            }
        )
    return pd.DataFrame(rows)


def rough_family(which: str, world: TabularWorld, seed: int) -> Family:
    """The families of the comparison over margins; all but the mixture are log-linear in scores
    with noise as large as the scores."""
    if which == "mixture, ε = 0.1":
        return MixtureFamily(world, 0.1)
    family = replace(LogLinearFamily.with_gap(world, 1.0, seed), size=1.0)
    spared = {"noise on both": [], "noise on the reward": [1], "noise on the utility": [0]}[which]
    noise = family.noise.copy()
    noise[spared] = 0
    return replace(family, noise=noise)


ROUGH = ("mixture, ε = 0.1", "noise on both", "noise on the reward", "noise on the utility")


def over_margins(which: str, worlds: int) -> pd.DataFrame:
    """The utility gain over π_ref (score units) of one-shot (the family's maximizer at λ*) and
    multi-shot (at λ_p*), by world and b."""
    table = []
    for seed in range(worlds):
        base = scaled_world(seed, 1, prompts=8, responses=60)
        for margin in MARGINS:
            world = with_margin(base, float(margin))
            family = rough_family(which, world, seed)
            one, multi = (
                family_dual(family, world.optimum.lambda_.to_numpy()),
                minimize_family_dual(family),
            )
            row = {
                "seed": seed,
                "b": margin,
                "one-shot": one.slack[0] + margin,
                "multi-shot": multi.slack[0] + margin,
            }
            table.append(row | {"λ*": one.lam[0], "λ_p*": multi.lam[0]})
    return pd.DataFrame(table)


def margins_table(table: pd.DataFrame) -> pd.DataFrame:
    """By margin: median [10 %, 90 %] over worlds, and in how many worlds one-shot (multi-shot) is
    off by more than 1 % of b."""
    lines = []
    for margin, group in table.groupby("b"):
        cells = {"b": f"{margin:.2f}"}
        low, middle, high = group["one-shot"].quantile([0.1, 0.5, 0.9])
        cells["one-shot gain"] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        share = group["one-shot"] / margin - 1
        cells |= {"short": f"{(share < -0.01).sum()}", "over": f"{(share > 0.01).sum()}"}
        missed = (group["multi-shot"] / margin - 1).abs() > 0.01
        cells |= {"multi-shot off": f"{missed.sum()}", "worlds": f"{len(group)}"}
        cells["multi-shot misses b by, else"] = (
            f"{(group['multi-shot'] - margin).abs()[~missed].max():.0e}"
        )
        lines.append(
            cells
            | {
                "median λ*": f"{group['λ*'].median():.2f}",
                "median λ_p*": f"{group['λ_p*'].median():.2f}",
            }
        )
    return pd.DataFrame(lines)


def family_first(table: pd.DataFrame) -> pd.DataFrame:
    return table[["family", *table.columns.drop("family")]]


def print_table(table: pd.DataFrame) -> None:
    print("| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns))
    for row in table.itertuples(index=False):
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |", flush=True)
    print(flush=True)


def print_inequalities(rows: list[tuple[Row, float]]) -> None:
    table = summarize(rows).reset_index()
    for column in ("median ratio", "largest ratio"):
        table[column] = table[column].map(lambda v: "" if np.isnan(v) else f"{v:.2g}")
    print_table(
        table.assign(**{"largest excess": table["largest excess"].map(lambda v: f"{v:.0e}")})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--worlds", type=int, default=24, help="worlds per setting and number of constraints"
    )
    parser.add_argument("--output", type=Path, help="folder for the figures")
    arguments = parser.parse_args()
    tables = {}
    for title, (kind, std, beta) in SETTINGS.items():
        rows, tables[title] = measure(kind, std, beta, arguments.worlds)
        print(f"### {title}\n", flush=True)
        print_inequalities(rows)
        print_table(slopes(tables[title], std))
    margins = {which: over_margins(which, arguments.worlds) for which in ROUGH}
    print("### One-shot and multi-shot over margins\n")
    print_table(
        pd.concat(
            [margins_table(table).assign(family=which) for which, table in margins.items()]
        ).pipe(family_first)
    )
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        draw_rates(tables, arguments.output / "theory_rates.png")
        draw_margins(margins, arguments.output / "theory_margins.png")
        world = with_margin(scaled_world(0, 1, prompts=8, responses=60), 0.5)
        shown = {
            which: rough_family(which, world, 0)
            for which in ("noise on both", "noise on the reward")
        }
        draw_geometry(
            {"mixture, ε = 0.3": MixtureFamily(world, 0.3), **shown},
            arguments.output / "theory_geometry.png",
        )


if __name__ == "__main__":
    main()
