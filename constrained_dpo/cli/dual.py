"""`cdpo dual`: the dual function on tables of scores, no model needed. Results on stdout, a user's
mistake exits 2."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.dual_tables import (
    feasibility_values,
    finite,
    print_solution,
    print_sweep,
    solution_values,
)
from constrained_dpo.cli.options import AsJson, parse_grids, print_json
from data_prep.console import parse_assignments
from data_prep.errors import UserError

if TYPE_CHECKING:
    from constrained_dpo.dual.scores import ScoreTable
    from constrained_dpo.kinds import Measure
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


Rate = Annotated[
    list[str],
    typer.Option(
        help="COLUMN=SCORE: the share of answers that score at least so much is the constraint "
        "COLUMN.rate, whose level --constraint or --threshold names"
    ),
]


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
    tail: Annotated[
        list[str],
        typer.Option(
            help="COLUMN=SHARE: the mean of the lowest share of the scores, such as 0.05, is the "
            "constraint COLUMN.tail, whose level --constraint or --threshold names"
        ),
    ] = [],
    rate: Rate = [],
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
    problem = _problem(reward, beta, levels, max_lambda, _measures(tail, rate))
    if problem.has_tails and (bootstrap or stability):
        raise UserError(
            "--tail: λ* moves with the tail's point, so that --bootstrap and --stability would "
            "say too little; drop them"
        )
    table, problem = _table(scores, problem, assume_reference, max_lambda)
    first = first_multipliers(table, problem, max_lambda)
    solution = first.plain
    ceilings = _ceilings(ceiling, problem)
    feasibility = (
        diagnose_feasibility(table, problem, None, ceilings) if solution.at_bound else None
    )
    values = solution_values(first) | {
        "kkt_residual": solution.kkt_residual,
        "passes": solution.passes,
        "num_prompts": first.prompts,
        "responses_per_prompt": first.responses,
        "num_responses": len(table.reward),
        "feasibility": feasibility_values(feasibility),
        "tail_points": problem.tail_points,
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
        values["stability"] = [finite(row) for row in parts.to_dict("records")]
    if as_json:
        print_json(values)
    else:
        print_solution(first, problem, interval, parts)
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
    rate: Rate = [],
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
    problem = _problem(reward, beta, levels, max_lambda, _measures([], rate))
    grid = levels["constraint"] | levels["threshold"]
    if not grid:
        raise UserError(
            "cdpo dual sweep: nothing to sweep; give --constraint COLUMN=LOW:HIGH:NUMBER"
        )
    if (settings := math.prod(len(values) for values in grid.values())) > MAX_SETTINGS:
        raise UserError(f"the grids have {settings} combinations; give at most {MAX_SETTINGS}")
    table, problem = _table(scores, problem, assume_reference, max_lambda)
    points = list(sensitivity.sweep(table, problem, grid, max_lambda))
    if plot is not None:
        from constrained_dpo.report.drawing import LIGHT, render, sweep_figure
        from data_prep.files import write_atomically

        write_atomically(plot, render(lambda style: sweep_figure(points, problem, style), LIGHT))
    if as_json:
        print_json([{"levels": p.bounds.to_dict()} | solution_values(p.first) for p in points])
    else:
        print_sweep(points, problem)
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
    reward: str,
    beta: float,
    levels: dict[str, dict[str, list[float]]],
    max_lambda: float,
    measures: dict[str, "Measure"],
) -> "ConstrainedProblem":
    """The problem at the first value of every grid; every value is checked."""
    from constrained_dpo.kinds import MEAN
    from constrained_dpo.problem import ConstrainedProblem, Constraint

    for name in measures:
        if name not in levels["constraint"] and name not in levels["threshold"]:
            column, kind = name.rsplit(".", 1)
            raise UserError(
                f"--{kind} {column}: its level is missing; give --constraint {name}=MARGIN or "
                f"--threshold {name}=LEVEL"
            )

    if not 0 < max_lambda < float("inf"):
        raise UserError(f"--max-lambda {max_lambda}: must be a finite number > 0")
    margins = [
        [Constraint(n, margin=v, measure=measures.get(n, MEAN)) for v in values]
        for n, values in levels["constraint"].items()
    ]
    thresholds = [
        [Constraint(n, threshold=v, measure=measures.get(n, MEAN)) for v in values]
        for n, values in levels["threshold"].items()
    ]
    return ConstrainedProblem(reward, beta, tuple(values[0] for values in margins + thresholds))


def _measures(tail: list[str], rate: list[str]) -> dict[str, "Measure"]:
    """What is constrained of a column, by the constraint's name."""
    from constrained_dpo.kinds import Measure

    shares, least = parse_assignments(tail, "--tail"), parse_assignments(rate, "--rate")
    for name, share in shares.items():
        if not 0 < share < 1:
            raise UserError(f"--tail {name}: the share is {share:g}; give one between 0 and 1")
    measures = {f"{name}.tail": Measure("tail", share) for name, share in shares.items()}
    return measures | {f"{name}.rate": Measure("rate", at=at) for name, at in least.items()}


def _ceilings(options: list[str], problem: "ConstrainedProblem") -> dict[str, float]:
    """The highest scores by constraint; raises UserError for a name that is no constraint."""
    ceilings = parse_assignments(options, "--ceiling")
    if unknown := sorted(set(ceilings) - set(problem.names)):
        raise UserError(f"--ceiling {unknown[0]}: no --constraint or --threshold names it")
    return ceilings


def _table(
    scores: Path, problem: "ConstrainedProblem", assume_reference: bool, max_lambda: float
) -> tuple["ScoreTable", "ConstrainedProblem"]:
    """The table, and the problem with the points of its tails."""
    from constrained_dpo.dual.score_files import read_scores

    read = read_scores(scores, problem, assume_reference, max_lambda)
    if read.taken_as:
        print(f"{scores}: {read.taken_as}", file=sys.stderr)
    return read.table, read.problem
