"""The papers' figures of several runs: achieved against demanded gain, the trade-off front, margins
as demanded and as met."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from constrained_dpo.experiments.compare import Group, points
from constrained_dpo.experiments.rows import Row
from constrained_dpo.report.drawing import MARKERS, WIDTH, Style
from constrained_dpo.report.picture import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WHAT_POINTS_ARE = (
    "A point is one run with its interval over prompts, or the mean of several runs "
    "(seeds) with Student's t-interval over them; ×: exact."
)


def pictures(group: Group, prefix: str) -> Iterator[Picture]:
    """Every figure of a group of comparable runs; prefix: of the files' names."""
    table, sources = points(group), [name for row in group.rows for name in _files(row)]
    colours = _colours(table)
    for index, name in enumerate(group.utilities, 1):
        rows = table[
            ~table["fixed"] & table[[f"demanded_{name}", f"gain_{name}"]].notna().all(axis=1)
        ]
        if len(rows):
            yield Picture(
                f"{prefix}achieved-{index}-{_slug(name)}",
                "achieved",
                f"Achieved against demanded: {name}",
                f"Gain of {name} demanded and achieved: "
                f"{_listed(rows, f'demanded_{name}', f'gain_{name}')}",
                f"Gain of {name} over π_ref on the test prompts against the gain demanded, score "
                "units; the line is what was demanded "
                "(methods drawn a little apart). "
                f"{WHAT_POINTS_ARE}",
                sources,
                partial(draw_achieved, table=rows, name=name, colours=colours),
            )
    for index, name in enumerate(group.utilities, 1):
        rows = table[table[[f"gain_{name}", f"gain_{group.reward}"]].notna().all(axis=1)]
        if len(rows):
            yield Picture(
                f"{prefix}front-{index}-{_slug(name)}",
                "front",
                f"Trade-off: {name} and {group.reward}",
                f"Gain of {name} and change of {group.reward}: "
                f"{_listed(rows, f'gain_{name}', f'gain_{group.reward}')}",
                f"Change of {group.reward} against gain of {name}, both over π_ref (square) on "
                "the test prompts, score units; up and to "
                "the right is better. Stars: one objective alone, the ends of the front. "
                f"{WHAT_POINTS_ARE}",
                sources,
                partial(draw_front, table=rows, names=(name, group.reward), colours=colours),
            )
    for one, other in combinations(group.utilities, 2):
        needed = [f"{kind}_{name}" for kind in ("demanded", "gain") for name in (one, other)]
        both = table[~table["fixed"] & table[needed].notna().all(axis=1)]
        if len(both):
            yield Picture(
                f"{prefix}margins-{_slug(one)}-{_slug(other)}",
                "margins",
                f"Demanded and met: {one} and {other}",
                f"Gains demanded of {one} and {other}: {_listed(both, *needed[0:2])}; achieved: "
                f"{_listed(both, *needed[2:4])}",
                f"Hollow: the gains of {one} and {other} demanded; filled: those achieved on the "
                "test prompts, score units. Where the "
                "filled point lies to the right of and above the hollow one, both constraints are "
                "met.",
                sources,
                partial(draw_margins, table=both, names=(one, other), colours=colours),
            )


def _listed(table: pd.DataFrame, first: str, second: str) -> str:
    """Method and two numbers of every point, for those who do not see the figure."""
    rows = zip(table["method"], table[first], table[second], strict=True)
    return "; ".join(f"{method} {one:+.3g}, {other:+.3g}" for method, one, other in rows)


def _files(row: Row) -> list[str]:
    return [
        f"{row.name}/{file.relative_to(row.run.path).as_posix()}"
        for file in (row.run.samples_file(row.number), row.run.reference_file)
    ]


def _slug(name: str) -> str:
    return name.replace("_", "-")


def _colours(table: pd.DataFrame) -> dict[str, int]:
    """A colour's number by method, the same in every figure."""
    return {method: index for index, method in enumerate(dict.fromkeys(table["method"]))}


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: "Figure", handles: list) -> None:
    """Below the axes; each row beyond three makes the figure taller, not the axes smaller."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = 1 if longest > 22 else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, -(-len(handles) // columns) - 3))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        handlelength=1.8,
        columnspacing=1.2,
    )


def _errors(rows: pd.DataFrame, name: str) -> np.ndarray:
    """(2, num_points) distances to the interval's ends, 0 where it is not finite."""
    ends = np.array(
        [rows[f"gain_{name}"] - rows[f"low_{name}"], rows[f"high_{name}"] - rows[f"gain_{name}"]],
        dtype=float,
    )
    return np.where(np.isfinite(ends), ends, 0.0)


def draw_achieved(
    style: Style, table: pd.DataFrame, name: str, colours: dict[str, int]
) -> "Figure":
    """Gain against demanded gain of one utility with the diagonal, score units. table:
    `compare.points`; colours: number by method."""
    figure, axes = _figure(3.8)
    ends = [table[f"demanded_{name}"].min(), table[f"demanded_{name}"].max()]
    room = 0.08 * (ends[1] - ends[0]) or 0.1 * abs(ends[0]) or 0.1
    span = [ends[0] - room, ends[1] + room]
    handles: list[Any] = axes.plot(
        span,
        span,
        color=style.neutral,
        linewidth=1.2,
        linestyle="--",
        label="exactly what was demanded",
    )
    methods = list(dict.fromkeys(table["method"]))
    for method, rows in table.groupby("method", sort=False):
        index = colours[str(method)]
        rows = rows.sort_values(f"demanded_{name}")
        apart = methods.index(str(method)) - (len(methods) - 1) / 2  # so that no bar covers another
        x = rows[f"demanded_{name}"] + 0.01 * (span[1] - span[0]) * apart
        line = (
            "-"
            if rows[f"demanded_{name}"].is_unique and all(len(s) == 1 for s in rows["setting"])
            else ""
        )
        handles.append(
            axes.errorbar(
                x,
                rows[f"gain_{name}"],
                yerr=_errors(rows, name),
                color=style.colour(index),
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linestyle=line,
                linewidth=1.4,
                capsize=2.5,
                label=method,
            )
        )
        axes.plot(x, rows[f"exact_{name}"], "x", color=style.text, markersize=4.5, zorder=5)
    axes.set_xlabel(f"{name}: demanded gain b (score units)")
    axes.set_ylabel(f"{name}: achieved gain (score units)")
    _legend(figure, handles)
    return figure


def draw_front(
    style: Style, table: pd.DataFrame, names: tuple[str, str], colours: dict[str, int]
) -> "Figure":
    """Reward change against utility gain with π_ref and the ends, score units. names: utility,
    reward; table: `compare.points`."""
    name, reward = names
    figure, axes = _figure(4.0)
    handles: list[Any] = axes.plot(
        0, 0, linestyle="", marker="s", markersize=8, color=style.neutral, label="π_ref"
    )
    for method, rows in table.groupby("method", sort=False):
        index = colours[str(method)]
        rows = rows.sort_values(f"gain_{name}")
        end = rows["alone"].notna().any()
        line = "-" if len(rows) > 1 and all(len(s) == 1 for s in rows["setting"]) else ""
        handles.append(
            axes.errorbar(
                rows[f"gain_{name}"],
                rows[f"gain_{reward}"],
                xerr=_errors(rows, name),
                yerr=_errors(rows, reward),
                color=style.colour(index),
                marker="*" if end else MARKERS[index % len(MARKERS)],
                markersize=12 if end else 5,
                linestyle=line,
                linewidth=1.4,
                elinewidth=0.9,
                label=method,
            )
        )
        axes.plot(
            rows[f"exact_{name}"],
            rows[f"exact_{reward}"],
            "x",
            color=style.text,
            markersize=4.5,
            zorder=5,
        )
    best = (
        table[[f"best_{name}", f"best_{reward}"]]
        .dropna()
        .drop_duplicates()
        .sort_values(f"best_{name}")
    )
    if len(best):
        line = ":" if all(len(setting) == 1 for setting in table.loc[best.index, "setting"]) else ""
        handles += axes.plot(
            *best.to_numpy().T,
            color=style.text,
            linewidth=1,
            linestyle=line,
            marker=".",
            label="exact optimum",
        )
    axes.locator_params(nbins=6)
    axes.set_xlabel(f"gain of {name} over π_ref (score units)")
    axes.set_ylabel(f"change of {reward} (score units)")
    _legend(figure, handles)
    return figure


def draw_margins(
    style: Style, table: pd.DataFrame, names: tuple[str, str], colours: dict[str, int]
) -> "Figure":
    """Demanded and achieved gains of two utilities in one plane, score units. table:
    `compare.points`."""
    one, other = names
    figure, axes = _figure(4.0)
    handles = axes.plot(
        [],
        [],
        linestyle="",
        marker="o",
        markerfacecolor="none",
        color=style.neutral,
        label="demanded",
    )
    for method, rows in table.groupby("method", sort=False):
        index = colours[str(method)]
        colour, marker = style.colour(index), MARKERS[index % len(MARKERS)]
        for _, row in rows.iterrows():
            x, y = ([row[f"demanded_{n}"], row[f"gain_{n}"]] for n in (one, other))
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.7)
            axes.plot(
                x[:1],
                y[:1],
                linestyle="",
                marker=marker,
                markersize=6,
                markerfacecolor="none",
                color=colour,
            )
        handles += axes.plot(
            rows[f"gain_{one}"],
            rows[f"gain_{other}"],
            linestyle="",
            marker=marker,
            markersize=5.5,
            color=colour,
            label=method,
        )
    axes.set_xlabel(f"gain of {one} over π_ref (score units)")
    axes.set_ylabel(f"gain of {other} over π_ref (score units)")
    _legend(figure, handles)
    return figure
