"""Figures of slack by round, and of a run's way in the plane of slack and reward."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from constrained_dpo.report.drawing import Style, _figure, _legend, _whole_rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_slack(
    style: Style, name: str, estimates: dict[str, pd.DataFrame], confidence: float
) -> "Figure":
    """u of one constraint by round with its intervals against 0: dual and test prompts side by side
    on one scale.

    estimates: by split, one row per round with columns u, low, high, exact (NaN where unknown);
    score units.
    """
    figure = _figure(3.3)
    panels = figure.subplots(1, len(estimates), sharey=True)
    for index, (axes, (split, table)) in enumerate(zip(panels, estimates.items(), strict=True)):
        finite = np.isfinite(table["low"]) & np.isfinite(table["high"])
        errors = np.where(finite, [table["u"] - table["low"], table["high"] - table["u"]], 0.0)
        axes.axhline(0, color=style.text, linewidth=1.2)
        bars = axes.errorbar(
            table.index,
            table["u"],
            yerr=errors,
            color=style.colour(index),
            marker="os"[index],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=1.4,
            capsize=2.5,
            label=f"estimate, {100 * confidence:g} % interval",
        )
        bars[0].set_linestyle(":")
        handles = [bars]
        if table["exact"].notna().any():
            handles += axes.plot(
                table.index,
                table["exact"],
                linestyle="",
                marker="x",
                color=style.text,
                markersize=4,
                zorder=5,
                label="exact",
            )
        axes.set_title(f"{split} prompts")
        _whole_rounds(axes, int(table.index[-1]))
        figure.legend(
            handles=handles, loc="outside lower left" if index == 0 else "outside lower right"
        )
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, -0.05 * (high - low)), max(high, 0.05 * (high - low)))
    panels[0].set_ylabel(f"u({name}), score units")
    return figure


def ring(
    axes: "Axes", point: tuple[float, float], marker: str, size: float, colour: str, label: str
) -> list[Any]:
    """Draw a hollow marker around a point; give its handle."""
    return list(
        axes.plot(
            *point,
            linestyle="",
            marker=marker,
            markersize=size,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=1.8,
            zorder=5,
            label=label,
        )
    )


def _met_region(axes: "Axes", style: Style) -> Any:
    """Shades what meets the level, u ≥ 0; the axes leave room for it."""
    left, right = axes.get_xlim()
    right = max(right, 0.06 * (right - left))
    axes.axvline(0, color=style.colour(0), linestyle="--", linewidth=1.3)
    colour, label = style.colour(0), "meets the level"
    shaded = axes.axvspan(0, right, color=colour, alpha=0.16, linewidth=0, zorder=0, label=label)
    axes.set_xlim(left, right)
    return shaded


def draw_path(
    style: Style,
    rounds: pd.DataFrame,
    *,
    names: tuple[str, str],
    reference: tuple[float, float],
    optimum: tuple[float, float] | None,
    shown: int,
) -> "Figure":
    """The rounds' policies in the plane of one slack (x) and the reward (y), score units, with
    π_ref, the exact optimum, and the interval of the round shown.

    rounds: columns u, low, high, reward, index the round; names: utility and reward.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    figure = _figure(3.8)
    axes = figure.subplots()
    x, y = rounds["u"], rounds["reward"]
    handles: list[Any] = axes.plot(
        *reference, linestyle="", marker="s", markersize=8, color=style.neutral, label="π_ref"
    )
    axes.plot(
        [reference[0], x.iloc[0]],
        [reference[1], y.iloc[0]],
        color=style.neutral,
        linewidth=1,
        linestyle=":",
        zorder=1,
    )
    axes.plot(x, y, color=style.neutral, linewidth=1, zorder=1)
    ends = rounds.loc[[shown], ["low", "high"]].to_numpy()[0]
    if np.isfinite(ends).all():
        axes.plot(ends, [y[shown]] * 2, color=style.colour(1), linewidth=1.4, zorder=2)
    shades = LinearSegmentedColormap.from_list("rounds", style.rounds)
    points = axes.scatter(
        x,
        y,
        c=rounds.index,
        cmap=shades,
        vmin=0,
        vmax=max(int(rounds.index[-1]), 1),
        s=36,
        edgecolors=style.text,
        linewidths=0.6,
        zorder=3,
    )
    if len(rounds) > 1:
        figure.colorbar(
            points,
            ax=axes,
            label="round",
            ticks=MaxNLocator(nbins=8, integer=True),
            pad=0.02,
            aspect=30,
        )
    handles += ring(axes, (x[shown], y[shown]), "o", 13, style.colour(1), f"chosen: round {shown}")
    if optimum:
        handles += ring(axes, optimum, "*", 15, style.colour(2), "exact optimum")
    axes.margins(0.12)
    handles.append(_met_region(axes, style))
    axes.set_xlabel(f"slack u({names[0]}) (score units)")
    axes.set_ylabel(f"reward E[{names[1]}] (score units)")
    _legend(figure, handles, 2 if optimum else 3)
    return figure
