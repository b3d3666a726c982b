"""`cdpo dual`: the dual function on tables of scores, no model needed. Results on stdout, a user's
mistake exits 2."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from constrained_dpo.cli.options import AsJson, parse_grids, print_json, results_console
from data_prep.console import parse_assignments
from data_prep.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from constrained_dpo.dual.feasibility import Feasibility
    from constrained_dpo.dual.one_shot import FirstMultipliers
    from constrained_dpo.dual.scores import ScoreTable
    from constrained_dpo.dual.sensitivity import SweepPoint
    from constrained_dpo.problem import ConstrainedProblem


MAX_SETTINGS = 10_000


app = typer.Typer(
    no_args_is_help=True, help="The dual function on tables of scores: no model needed."
)


Scores = Annotated[
    Path,
    typer.Argument(
        help="parquet, csv or jsonl of reference samples: prompt_id and the score columns"
    ),
]


Reward = Annotated[str, typer.Option(help="reward column")]


Beta = Annotated[float, typer.Option(help="β, reward units per nat")]


MaxLambda = Annotated[float, typer.Option(help="upper bound of every multiplier")]


AssumeReference = Annotated[
    bool, typer.Option("--assume-reference", help="take every row as the reference policy's sample")
]


@app.command()
def solve(
    scores: Scores,
    reward: Reward,
    beta: Beta,
    constraint: Annotated[
        list[str], typer.Option(help="COLUMN=MARGIN over the reference, once per utility")
    ] = [],
    threshold: Annotated[
        list[str], typer.Option(help="COLUMN=LEVEL, an absolute level, once per utility")
    ] = [],
    ceiling: Annotated[
        list[str],
        typer.Option(
            help="COLUMN=HIGHEST score that there can be, once per utility: a level above it is "
            "infeasible, whatever was sampled"
        ),
    ] = [],
    max_lambda: MaxLambda = 1000.0,
    bootstrap: Annotated[
        int, typer.Option(help="resample the prompts so many times for a 95 % interval of λ*")
    ] = 0,
    seed: Annotated[int, typer.Option(help="of --bootstrap and --stability")] = 0,
    stability: Annotated[
        bool,
        typer.Option("--stability", help="λ* on parts of the table: how many samples do I need"),
    ] = False,
    assume_reference: AssumeReference = False,
    as_json: AsJson = False,
) -> None:
    """One-shot multipliers λ* from samples of the reference policy, with D(λ*) and the predicted
    means."""
    import numpy as np

    from constrained_dpo.dual import sensitivity
    from constrained_dpo.dual.feasibility import diagnose_feasibility
    from constrained_dpo.dual.one_shot import first_multipliers

    if bootstrap < 0 or bootstrap == 1:
        raise UserError(f"--bootstrap {bootstrap}: give at least 2 replicates, or 0 for none")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be ≥ 0")
    levels = {
        k: {n: [v] for n, v in parse_assignments(o, f"--{k}").items()}
        for k, o in _named(constraint, threshold)
    }
    problem = _problem(reward, beta, levels, max_lambda)
    table = _table(scores, problem, assume_reference)
    first = first_multipliers(table, problem, max_lambda)
    solution = first.plain
    ceilings = _ceilings(ceiling, problem)
    feasibility = (
        diagnose_feasibility(table, problem, None, ceilings) if solution.at_bound else None
    )
    values = _solution_values(first) | {
        "kkt_residual": solution.kkt_residual,
        "passes": solution.passes,
        "num_prompts": first.prompts,
        "responses_per_prompt": first.responses,
        "num_responses": len(table.reward),
        "feasibility": _feasibility_values(feasibility),
    }
    interval = parts = None
    if bootstrap:
        resampled = sensitivity.bootstrap_multipliers(
            table, problem, bootstrap, np.random.default_rng(seed), max_lambda
        )
        interval = resampled.interval
        values["lambda_ci"] = {n: [interval["low"][n], interval["high"][n]] for n in problem.names}
        values["bootstrap"] = {
            "replicates": bootstrap,
            "seed": seed,
            "at_bound": resampled.at_bound,
        }
    if stability:
        parts = sensitivity.stability(table, problem, np.random.default_rng(seed), max_lambda)
        values["stability"] = [_finite(row) for row in parts.to_dict("records")]
    if as_json:
        print_json(values)
    else:
        _print_solution(first, problem, interval, parts)
    if feasibility is not None:
        at = " and ".join(solution.at_bound)
        print(
            f"warning: λ* of {at} is at its bound {max_lambda:g}, --max-lambda. "
            f"{feasibility.sentence()}",
            file=sys.stderr,
        )


@app.command()
def sweep(
    scores: Scores,
    reward: Reward,
    beta: Beta,
    constraint: Annotated[
        list[str], typer.Option(help="COLUMN=LOW:HIGH:NUMBER or COLUMN=A,B,… margins")
    ] = [],
    threshold: Annotated[list[str], typer.Option(help="the same for absolute levels")] = [],
    max_lambda: MaxLambda = 1000.0,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the predicted trade-off curve")
    ] = None,
    assume_reference: AssumeReference = False,
    as_json: AsJson = False,
) -> None:
    """λ* and the predicted means over a grid of margins: every combination of the values given."""
    from constrained_dpo.dual import sensitivity

    levels = {
        kind: parse_grids(options, f"--{kind}") for kind, options in _named(constraint, threshold)
    }
    problem = _problem(reward, beta, levels, max_lambda)
    grid = levels["constraint"] | levels["threshold"]
    if not grid:
        raise UserError(
            "cdpo dual sweep: nothing to sweep; give --constraint COLUMN=LOW:HIGH:NUMBER"
        )
    if (settings := math.prod(len(values) for values in grid.values())) > MAX_SETTINGS:
        raise UserError(f"the grids have {settings} combinations; give at most {MAX_SETTINGS}")
    table = _table(scores, problem, assume_reference)
    points = list(sensitivity.sweep(table, problem, grid, max_lambda))
    if plot is not None:
        from constrained_dpo.report.drawing import LIGHT, render, sweep_figure
        from data_prep.files import write_atomically

        write_atomically(plot, render(lambda style: sweep_figure(points, problem, style), LIGHT))
    if as_json:
        print_json([{"levels": p.bounds.to_dict()} | _solution_values(p.first) for p in points])
    else:
        _print_sweep(points, problem)
    if unmet := sum(bool(p.first.plain.at_bound) for p in points):
        print(
            f"warning: in {unmet} of {len(points)} settings a multiplier is at its bound "
            f"{max_lambda:g} (marked !): these samples do not "
            "reach the level within it; `cdpo dual solve` says why",
            file=sys.stderr,
        )


def _named(constraint: list[str], threshold: list[str]) -> list[tuple[str, list[str]]]:
    return [("constraint", constraint), ("threshold", threshold)]


def _problem(
    reward: str, beta: float, levels: dict[str, dict[str, list[float]]], max_lambda: float
) -> "ConstrainedProblem":
    """The problem at the first value of every grid; every value is checked."""
    from constrained_dpo.problem import ConstrainedProblem, Constraint

    if not 0 < max_lambda < float("inf"):
        raise UserError(f"--max-lambda {max_lambda}: must be a finite number > 0")
    margins = [
        [Constraint(n, margin=v) for v in values] for n, values in levels["constraint"].items()
    ]
    thresholds = [
        [Constraint(n, threshold=v) for v in values] for n, values in levels["threshold"].items()
    ]
    return ConstrainedProblem(reward, beta, tuple(values[0] for values in margins + thresholds))


def _ceilings(options: list[str], problem: "ConstrainedProblem") -> dict[str, float]:
    """The highest scores by constraint; raises UserError for a name that is no constraint."""
    ceilings = parse_assignments(options, "--ceiling")
    if unknown := sorted(set(ceilings) - set(problem.names)):
        raise UserError(f"--ceiling {unknown[0]}: no --constraint or --threshold names it")
    return ceilings


def _table(scores: Path, problem: "ConstrainedProblem", assume_reference: bool) -> "ScoreTable":
    from constrained_dpo.dual.score_files import read_scores

    read = read_scores(scores, problem, assume_reference)
    if read.taken_as:
        print(f"{scores}: {read.taken_as}", file=sys.stderr)
    return read.table


def _solution_values(first: "FirstMultipliers") -> dict[str, object]:
    solution = first.plain
    return {
        "lambda": first.lambda_.to_dict(),
        "lambda_sampled": solution.lambda_.to_dict(),
        "dual_value": solution.dual_value,
        "ess": solution.ess,
        "min_ess": solution.min_ess,
        "reward": solution.reward,
        "utilities": solution.utilities.to_dict(),
        "kl": solution.kl,
        "at_bound": list(solution.at_bound),
    }


def _feasibility_values(feasibility: "Feasibility | None") -> dict[str, object] | None:
    if feasibility is None:
        return None
    numbers = {
        "slack": feasibility.slack,
        "se": feasibility.se,
        "num_prompts": feasibility.num_prompts,
    }
    return {
        "verdict": feasibility.verdict,
        "constraints": list(feasibility.constraints),
        "together": feasibility.together,
        "largest": feasibility.largest.to_dict(),
        "shortfall": feasibility.shortfall.to_dict(),
        **_finite(numbers),
        "sentence": feasibility.sentence(),
    }


def _finite(row: Mapping[Any, Any]) -> dict[str, object]:
    """JSON has no nan and no infinity: null instead."""
    return {
        str(k): None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }


def _print_solution(
    first: "FirstMultipliers",
    problem: "ConstrainedProblem",
    interval: "pd.DataFrame | None",
    parts: "pd.DataFrame | None",
) -> None:
    solution = first.plain
    for name in problem.names:
        error = ""
        if interval is not None:
            error = f" [{interval['low'][name]:.4g}, {interval['high'][name]:.4g}]"
        print(
            f"λ*({name}) = {first.lambda_[name]:.6g}{error}, {solution.lambda_[name]:.6g} before "
            f"the correction for {first.responses} responses per prompt; predicted E[{name}] = "
            f"{solution.utilities[name]:.6g}"
        )
    print(
        f"D(λ*) = {solution.dual_value:.6g}; predicted E[{problem.reward}] = "
        f"{solution.reward:.6g}, KL {solution.kl:.4g} nats; "
        f"ESS per prompt: mean {solution.ess:.1f}, min {solution.min_ess:.1f}"
    )
    if parts is not None:
        for name in problem.names:
            results_console().print(_stability_table(name, parts[parts["constraint"] == name]))


def _stability_table(name: str, parts: "pd.DataFrame") -> "Table":
    from rich.table import Table

    title = f"λ*({name}) on random parts of the table, mean ± sd"
    table = Table("prompts", title=title, title_justify="left")
    rows: dict[int, dict[int, str]] = {}
    for row in parts.to_dict("records"):
        spread = f" ± {row['sd']:.2g}" if row["repeats"] > 1 else ""
        cells = rows.setdefault(row["num_prompts"], {})
        cells[row["num_responses"]] = f"{row['mean']:.4g}{spread}"
    sizes = sorted({size for cells in rows.values() for size in cells})
    for size in sizes:
        table.add_column(f"{size} responses", justify="right")
    for count, cells in sorted(rows.items()):
        table.add_row(str(count), *(cells[size] for size in sizes))
    return table


def _print_sweep(points: list["SweepPoint"], problem: "ConstrainedProblem") -> None:
    from rich.table import Table

    names, table = problem.names, Table()
    head = [
        f"{'margin' if c.threshold is None else 'threshold'} {c.name}" for c in problem.constraints
    ]
    head += [f"λ*({n})" for n in names]
    for column in (*head, *(f"E[{n}]" for n in problem.objectives), "KL", "ESS"):
        table.add_column(column, justify="right")
    for point in points:
        solution, lambda_ = point.first.plain, point.first.lambda_
        multipliers = (f"{lambda_[n]:.5g}{'!' if n in solution.at_bound else ''}" for n in names)
        levels = (f"{point.bounds[n]:.4g}" for n in names)
        means = (solution.reward, *solution.utilities, solution.kl)
        numbers = (f"{value:.4g}" for value in means)
        table.add_row(*levels, *multipliers, *numbers, f"{solution.ess:.1f}")
    results_console().print(table)
