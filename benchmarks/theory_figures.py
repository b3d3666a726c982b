"""The figures of docs/theory.md. matplotlib is imported where it draws."""

from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import TabularWorld
from tests.helpers.restricted_families import (
    Family,
    LogLinearFamily,
    family_dual,
    gibbs,
    minimize_family_dual,
    objective_and_slack,
)

QUANTITIES = {
    "primal-dual gap P* − D_p*": "C0",
    "objective gap, one-shot": "C1",
    "constraint gap, one-shot": "C2",
    "policies E‖π_p(λ_p*) − π*‖₁": "C3",
}


def axes_of(columns: int, height: float = 3.6):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, columns, figsize=(4.2 * columns, height), layout="constrained", squeeze=False
    )
    return figure, axes[0]


def draw_rates(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Median of each gap over worlds against ν, with the bound of B and lines of slope 1
    and 1/2."""
    figure, all_axes = axes_of(len(tables))
    for axes, (title, table) in zip(all_axes, tables.items(), strict=True):
        middle = table.assign(rank=table.groupby(["m", "seed"]).cumcount()).groupby("rank").median()
        for name, colour in QUANTITIES.items():
            shown = middle[middle[name] > 1e-12]
            axes.loglog(shown["nu"], shown[name], "o-", ms=3, lw=1.2, color=colour, label=name)
        axes.loglog(middle["nu"], middle["bound"], "k:", lw=1.2, label="C ν (B)")
        top, reach = middle["nu"].iloc[-1], middle["nu"] / middle["nu"].iloc[-1]
        anchor = middle[list(QUANTITIES)].iloc[-1].max() * 2
        axes.loglog(top * reach, anchor * reach, "--", color="0.7", lw=1, label="slope 1")
        axes.loglog(top * reach, anchor * reach**0.5, "-.", color="0.7", lw=1, label="slope 1/2")
        axes.set(title=title, xlabel="parametrization gap ν")
        axes.title.set_fontsize(9)
    all_axes[0].set_ylabel("score units; policies: L1")
    all_axes[0].legend(frameon=False, fontsize=6.5)
    figure.savefig(path, dpi=130)


def random_policies(world: TabularWorld, count: int, seed: int) -> list[np.ndarray]:
    """Policies of all kinds: π_ref tilted by reward, utility and noise of random weights;
    log-probabilities."""
    rng, policies = np.random.default_rng(seed), []
    utility = world.utilities[world.problem.names[0]]
    for _ in range(count):
        weights = rng.normal(size=3) * rng.uniform(0, 4)
        logp = (
            world.ref_logp
            + weights[0] * world.reward
            + weights[1] * utility
            + weights[2] * rng.normal(size=world.reward.shape) * 0.7
        )
        policies.append(logp - np.logaddexp.reduce(logp, axis=1, keepdims=True))
    return policies


def members(family: Family, count: int, seed: int) -> list[np.ndarray]:
    """Random policies of the family, log-probabilities."""
    if isinstance(family, LogLinearFamily):
        rng = np.random.default_rng(seed)
        return [family.policy(rng.uniform(-4, 4, size=len(family.features))) for _ in range(count)]
    floor = np.log(family.epsilon) + family.world.ref_logp
    return [
        np.logaddexp(np.log1p(-family.epsilon) + p, floor)
        for p in random_policies(family.world, count, seed)
    ]


def plane(world: TabularWorld, policies: list[np.ndarray]) -> np.ndarray:
    """(n, 2): slack u and objective F = E[r] − β KL of each policy, score units."""
    values = [objective_and_slack(world, p) for p in policies]
    return np.array([[slack[0], objective] for objective, slack in values])


def draw_geometry(families: dict[str, Family], path: Path) -> None:
    """The image of all policies and of a family in the (utility gain, E[r] − β KL) plane, each with
    its supporting line at b."""
    figure, all_axes = axes_of(len(families), 4.0)
    tilts = np.concatenate([np.linspace(-0.8, 4, 60), np.geomspace(4.2, 40, 20)])
    for axes, (title, family) in zip(all_axes, families.items(), strict=True):
        world = family.world
        margin, star = float(world.problem.bounds.iloc[0]), world.optimum.lambda_.to_numpy()
        best = minimize_family_dual(family)
        frontier = plane(world, [gibbs(world, np.array([t])) for t in tilts])
        inner = plane(world, [family.maximizer(np.array([t])) for t in tilts[tilts <= 5]])
        inside, cloud = (
            plane(world, random_policies(world, 1500, 0)),
            plane(world, members(family, 1500, 1)),
        )
        low, high = inner[:, 1].min() - 0.3, frontier[:, 1].max() + 0.25
        axes.fill_between(
            frontier[:, 0] + margin, frontier[:, 1], low - 2, color="C0", alpha=0.1, lw=0
        )
        axes.plot(*(inside + np.array([margin, 0])).T, ".", ms=1.5, color="C0", alpha=0.5)
        axes.plot(*(cloud + np.array([margin, 0])).T, ".", ms=1.5, color="C1", alpha=0.6)
        axes.plot(frontier[:, 0] + margin, frontier[:, 1], color="C0", lw=1.5, label="all policies")
        axes.plot(inner[:, 0] + margin, inner[:, 1], color="C1", lw=1.5, label="the family")
        gain = np.linspace(margin - 1.5, margin + 1.5, 2)
        axes.plot(
            gain,
            world.optimum.dual_value - star[0] * (gain - margin),
            "--",
            color="C0",
            lw=1,
            label="slope −λ*, through P*",
        )
        axes.plot(
            gain,
            best.dual_value - best.lam[0] * (gain - margin),
            "--",
            color="C1",
            lw=1,
            label="slope −λ_p*, through D_p*",
        )
        one_shot = family_dual(family, star)
        axes.plot(margin, world.optimum.dual_value, "o", color="C0", ms=5)
        axes.plot(best.slack + margin, best.objective, "o", color="C1", ms=5, label="multi-shot")
        axes.plot(
            one_shot.slack + margin, one_shot.objective, "s", color="C3", ms=5, label="one-shot"
        )
        axes.axvline(margin, color="0.6", lw=0.8)
        axes.set(
            title=title,
            xlabel="utility gain over π_ref (grey: b)",
            ylim=(low, high),
            xlim=(margin - 1.7, margin + 1.2),
        )
        axes.title.set_fontsize(9)
    all_axes[0].set_ylabel("E[r] − β KL")
    all_axes[0].legend(frameon=False, fontsize=7, loc="lower left")
    figure.savefig(path, dpi=130)


def draw_margins(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Utility gain against the margin: median and 10–90 % over worlds."""
    figure, all_axes = axes_of(len(tables), 3.4)
    for axes, (title, table) in zip(all_axes, tables.items(), strict=True):
        for name, colour in (("one-shot", "C3"), ("multi-shot", "C1")):
            band = table.groupby("b")[name].quantile([0.1, 0.5, 0.9]).unstack()
            axes.fill_between(band.index, band[0.1], band[0.9], color=colour, alpha=0.2, lw=0)
            axes.plot(band.index, band[0.5], "o-", ms=3, lw=1.2, color=colour, label=name)
        axes.plot(
            [0, table["b"].max()], [0, table["b"].max()], color="0.5", lw=0.8, label="exactly b"
        )
        axes.set(title=title, xlabel="margin b")
        axes.title.set_fontsize(9)
    all_axes[0].set_ylabel("utility gain over π_ref")
    all_axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
