"""The figure of a front: what each point gains in a utility against the reward that it keeps."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from constrained_dpo.evaluation.front_record import Front, FrontRow
from constrained_dpo.report.contents import signed
from constrained_dpo.report.drawing import DOTS_PER_INCH, LIGHT, MARKERS, WIDTH, Style, settings
from constrained_dpo.report.front_words import setting_words
from constrained_dpo.report.picture import Picture
from constrained_dpo.report.slack_drawing import ring
from constrained_dpo.run.record import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 12
"""So many points of a series have their margin beside them; more would cover each other."""


def front_pictures(front: Front, record: RoundRecord) -> Iterator[Picture]:
    """A figure for every constraint; record: of the round whose family the front is of."""
    names = list(front.levels)
    for index, name in enumerate(names, 1):
        gain = _own_gain(front, record, name)
        points = "; ".join(
            f"{setting_words(row)}: {signed(row.gains[name])}, {signed(row.reward_change)}"
            for row in front.rows
        )
        yield Picture(
            "front" if len(names) == 1 else f"front-{index}-{name}",
            "front",
            f"What {name} costs",
            f"Gain of {name} over π_ref and change of reward at each setting: {points}; round "
            f"{front.round}'s own policy: {signed(gain)}, {signed(0.0)}",
            f"Gain of {name} over π_ref, and the change of E[{front.reward}] against round "
            f"{front.round}'s own policy (ringed), on the test prompts. Bars: "
            f"{100 * front.confidence:g} % intervals of the gain and two standard errors of the "
            "change. Numbers: the margin, or the given λ. Hollow: outside the range that the "
            "family was trained on. The reward leaves the KL term out; π_ref's is "
            f"{signed(front.reference[front.reward])}.",
            ["front/front.json"],
            partial(draw_front, front=front, name=name, chosen=gain),
        )


def _series(front: Front) -> dict[str, list[FrontRow]]:
    """Points by what they are: solved for margins, at a given λ; each by κ."""
    series: dict[str, list[FrontRow]] = {}
    for row in front.rows:
        label = "margins" if row.solved else "given λ"
        series.setdefault(label + (f", κ {row.kappa:g}" if row.kappa != 1 else ""), []).append(row)
    return series


def draw_front(style: Style, front: Front, name: str, chosen: float) -> "Figure":
    """The gain of one utility over π_ref (x) and the change of the reward against the run's own
    policy (y) of every point, score units, with their intervals and the recipe's margin.

    chosen: the gain of the run's own policy.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    for index, (label, rows) in enumerate(_series(front).items()):
        handles += _draw_series(axes, style, index, (label, name), rows)
    margin = front.levels[name] - _shift(front, name)
    handles.append(
        axes.axvline(
            margin, color=style.colour(1), linestyle="--", linewidth=1.3, label="recipe's margin"
        )
    )
    axes.axhline(0, color=style.neutral, linewidth=1.0, zorder=0)
    handles += ring(axes, (chosen, 0.0), "o", 13, style.colour(1), f"chosen: round {front.round}")
    axes.margins(0.08)
    axes.set_xlabel(f"gain of {name} over π_ref (score units)")
    axes.set_ylabel(f"change of E[{front.reward}] (score units)")
    columns = 3 if len(handles) <= 3 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.8)
    return figure


def front_marks(front: Front, record: RoundRecord) -> list[list[tuple[float, float]]]:
    """Give where each point is on each figure: (x, y) as shares of the image's width from the left
    and of its height from the top, by figure and point."""
    from matplotlib import rc_context

    marks = []
    for name in front.levels:
        points = np.array([(row.gains[name], row.reward_change) for row in front.rows])
        with rc_context(rc=settings(LIGHT)):  # dark figures have the same layout
            figure = draw_front(LIGHT, front, name, _own_gain(front, record, name))
            figure.set_dpi(DOTS_PER_INCH)
            figure.draw_without_rendering()
            places = figure.axes[0].transData.transform(points.reshape(-1, 2)) / figure.bbox.size
        marks.append([(float(x), 1 - float(y)) for x, y in places])
    return marks


def _own_gain(front: Front, record: RoundRecord, name: str) -> float:
    """The gain of the round's own policy over π_ref (score units)."""
    return record.test.utilities[name] - front.reference[name]


def _shift(front: Front, name: str) -> float:
    """What lies between a level and a gain: 0 for a margin, π_ref's mean for a threshold."""
    row = next(iter(front.rows), None)
    if row is None:
        return 0.0
    return round(row.levels[name] + row.u[name] - row.gains[name], 9)


def _draw_series(
    axes: "Axes", style: Style, index: int, labels: tuple[str, str], rows: list[FrontRow]
) -> list[Any]:
    """One kind of points with their intervals; labels: of the series, and the utility."""
    label, name = labels
    colour, marker = style.colour(0 if index == 0 else index + 1), MARKERS[index % len(MARKERS)]
    x, y = [row.gains[name] for row in rows], [row.reward_change for row in rows]
    ends = [row.gain_interval(name) for row in rows]
    below = [gain - low for gain, (low, _) in zip(x, ends, strict=True)]
    above = [high - gain for gain, (_, high) in zip(x, ends, strict=True)]
    axes.errorbar(
        x,
        y,
        xerr=[below, above],
        yerr=[2 * row.reward_change_se for row in rows],
        linestyle="",
        color=colour,
        elinewidth=0.9,
        alpha=0.45,
    )
    if len(rows[0].levels) == 1:
        axes.plot(x, y, color=colour, linewidth=1.2)
    for place, (row, gain, reward) in enumerate(zip(rows, x, y, strict=True)):
        hollow = bool(row.outside or row.kappa_outside)
        face = style.background if hollow else colour
        axes.plot(gain, reward, marker=marker, markersize=6, color=colour, markerfacecolor=face)
        if len(rows) <= LABELLED:
            words = f"{row.levels[name] if row.solved else row.lambda_[name]:.3g}"
            offset = (4, 5) if place % 2 else (-4, -12)  # neighbours do not cover each other
            axes.annotate(words, (gain, reward), offset, textcoords="offset points", fontsize=7.5)
    return list(axes.plot([], [], marker=marker, linestyle="", color=colour, label=label))
