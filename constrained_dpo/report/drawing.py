"""The report's figures: one panel each, drawn for a light and a dark page. Plain values in, a
matplotlib Figure out.

matplotlib is imported where it is used, and only its object-oriented API: no pyplot, no global
state left behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from constrained_dpo.dual.sensitivity import SweepPoint
from constrained_dpo.problem import ConstrainedProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH = (
    # inches: 332 points, about a phone's width in pixels, so type is about as large as it says
    4.6
)


DOTS_PER_INCH = 200


MARKERS = "osD^vP*"


@dataclass(frozen=True)
class Style:
    """Colours of one page theme; `series` is colour-blind safe (Okabe and Ito; for dark pages their
    lighter members, or lightened ones)."""

    background: str
    text: str
    grid: str
    neutral: str
    series: tuple[str, ...]
    rounds: tuple[str, str]  # first to last round

    def colour(self, index: int) -> str:
        return self.series[index % len(self.series)]


LIGHT = Style(
    background="#ffffff",
    text="#1c2733",
    grid="#dfe4ea",
    neutral="#8792a0",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9"),
    rounds=("#bcd7ee", "#00395c"),
)


DARK = Style(
    background="#171c23",
    text="#e3e8ee",
    grid="#323b46",
    neutral="#8e99a6",
    series=("#56b4e9", "#ff8f4d", "#2fc79b", "#e39fc6", "#f0d442", "#9fb8ff"),
    rounds=("#2b4a63", "#bfe4ff"),
)


def settings(style: Style) -> Any:
    """Give the matplotlib settings, a dict, that figures of a style are drawn under."""
    return {
        "figure.facecolor": style.background,
        "axes.facecolor": style.background,
        "savefig.facecolor": style.background,
        "text.color": style.text,
        "axes.labelcolor": style.text,
        "axes.titlecolor": style.text,
        "axes.edgecolor": style.neutral,
        "xtick.color": style.text,
        "ytick.color": style.text,
        "grid.color": style.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 10,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "text.usetex": False,
    }


def render(draw: Callable[[Style], "Figure"], style: Style) -> bytes:
    """The figure that `draw` makes for this style, as PNG bytes."""
    from matplotlib import rc_context

    with rc_context(rc=settings(style)):
        buffer = BytesIO()
        draw(style).savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _legend(figure: "Figure", handles: list, columns: int) -> None:
    """Below the axes, where it covers no data."""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        handlelength=1.8,
        columnspacing=1.2,
    )


def _whole_rounds(axes: "Axes", last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.set_xlim(-0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def draw_certificate(
    style: Style, rounds: pd.DataFrame, optimum: float | None, shown: int
) -> "Figure":
    """Objective and dual value by round. rounds: (num_rounds, 4), columns objective, dual_value,
    dual_value_se, exact (NaN where unknown); optimum: the exact P* or None."""
    figure = _figure(3.3)
    axes = figure.subplots()
    handles: list[Any] = axes.plot(
        rounds.index,
        rounds["objective"],
        color=style.colour(0),
        marker="o",
        markersize=5,
        label="objective",
    )
    handles.append(
        axes.errorbar(
            rounds.index,
            rounds["dual_value"],
            yerr=2 * rounds["dual_value_se"],
            color=style.colour(1),
            marker="v",
            markersize=5,
            capsize=3,
            label="D(λ)",
        )
    )
    if rounds["exact"].notna().any():
        handles += axes.plot(
            rounds.index,
            rounds["exact"],
            "x",
            color=style.neutral,
            markersize=7,
            label="exact objective",
        )
    if optimum is not None:
        handles.append(
            axes.axhline(
                optimum, color=style.neutral, linestyle="--", linewidth=1.2, label="exact P*"
            )
        )
    axes.axvline(shown, color=style.neutral, linewidth=5, alpha=0.25, zorder=0)
    _whole_rounds(axes, int(rounds.index[-1]))
    axes.set_ylabel("E[r] − β KL (score units)")
    _legend(figure, handles, 2)
    return figure


def draw_multipliers(
    style: Style, history: pd.DataFrame, optimal: dict[str, float], shown: int
) -> "Figure":
    """λ by round, one line per constraint; the last, hollow point is the λ that the next round
    would use.

    history: (num_rounds + 1, num_constraints), index the round; optimal: exact λ* by constraint
    (empty where unknown).
    """
    figure = _figure(3.3)
    axes = figure.subplots()
    handles: list[Any] = []
    for index, name in enumerate(history.columns):
        colour, values = style.colour(index), history[name]
        marker = MARKERS[index % len(MARKERS)]
        handles += axes.plot(
            values.index[:-1],
            values.iloc[:-1],
            color=colour,
            marker=marker,
            markersize=5,
            label=f"λ({name})",
        )
        axes.plot(values.index[-2:], values.iloc[-2:], color=colour, linestyle=":", linewidth=1.4)
        axes.plot(
            values.index[-1:],
            values.iloc[-1:],
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor=style.background,
        )
        if name in optimal:
            axes.axhline(optimal[name], color=colour, linestyle="--", linewidth=1.2)
    if optimal:
        from matplotlib.lines import Line2D

        handles.append(
            Line2D([], [], color=style.neutral, linestyle="--", linewidth=1.2, label="exact λ*")
        )
    axes.axvline(shown, color=style.neutral, linewidth=5, alpha=0.25, zorder=0)
    _whole_rounds(axes, int(history.index[-1]))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("λ (reward units per utility unit)")
    _legend(figure, handles, 4)
    return figure


def draw_histogram(
    style: Style,
    before: np.ndarray,
    after: np.ndarray,
    *,
    label: str,
    policy: str,
    whole: bool = False,
) -> "Figure":
    """Shares of π_ref's and the policy's responses over common bins, with their means; whole: the
    values are counts, bins hold integers."""
    figure = _figure(3.1)
    axes = figure.subplots()
    values = np.concatenate([before, after])
    low, high = values.min(), values.max()
    count = int(np.clip(np.sqrt(len(before)), 8, 40))
    if whole:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        width = max(1, int(np.ceil((high - low + 1) / count)))
        edges = np.arange(low - 0.5, high + 0.5 + width, width)
    else:
        edges = (
            np.linspace(low, high, count + 1) if high > low else np.array([low - 0.5, low + 0.5])
        )
    handles: list[Any] = []
    for scores, colour, filled, name in (
        (before, style.neutral, True, "π_ref"),
        (after, style.colour(0), False, policy),
    ):
        share = np.histogram(scores, edges)[0] / len(scores)
        handles.append(
            axes.stairs(
                share,
                edges,
                color=colour,
                fill=filled,
                alpha=0.45 if filled else 1,
                linewidth=1.8,
                label=f"{name}, mean {scores.mean():.3g}".replace("-", "−"),
            )
        )
        axes.axvline(scores.mean(), color=colour, linestyle="--" if filled else "-", linewidth=1.4)
    axes.set_xlabel(label)
    axes.set_ylabel("share of responses")
    axes.set_ylim(bottom=0)
    _legend(figure, handles, 2)
    return figure


def sweep_figure(points: list[SweepPoint], problem: ConstrainedProblem, style: "Style") -> "Figure":
    """Predicted E[r] against predicted E[g] along the first constraint that varies; one line per
    setting of the others."""
    from matplotlib.figure import Figure

    bounds = pd.DataFrame([p.bounds for p in points])
    across = next((n for n in problem.names if bounds[n].nunique() > 1), problem.names[0])
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    others = [n for n in problem.names if n != across and bounds[n].nunique() > 1]
    for index, (setting, rows) in enumerate(
        bounds.groupby(others, sort=False) if others else [((), bounds)]
    ):
        line = [points[i].first.plain for i in rows.index]
        label = ", ".join(f"{n} ≥ {v:g}" for n, v in zip(others, setting, strict=True))
        axes.plot(
            [s.utilities[across] for s in line],
            [s.reward for s in line],
            "o-",
            ms=3,
            color=style.colour(index),
            label=label or None,
        )
    axes.set(xlabel=f"predicted E[{across}]", ylabel=f"predicted E[{problem.reward}]")
    if others:
        axes.legend()
    return figure
