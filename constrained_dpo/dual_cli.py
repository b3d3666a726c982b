"""`cdpo dual`: the dual function on tables of scores, no model needed. Results on stdout, a user's mistake exits 2."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.cli import parse_assignments
from data_prep.settings import UserError

app = typer.Typer(no_args_is_help=True, help="The dual function on tables of scores: no model needed.")


@app.callback()
def _group() -> None:
    """Keeps `solve` a subcommand while it is the only one."""


@app.command()
def solve(
    scores: Annotated[Path, typer.Argument(help="parquet, csv or jsonl of reference samples: prompt_id and the score columns")],
    reward: Annotated[str, typer.Option(help="reward column")],
    beta: Annotated[float, typer.Option(help="β, reward units per nat")],
    constraint: Annotated[list[str], typer.Option(help="COLUMN=MARGIN over the reference, once per utility")] = [],  # noqa: B006
    max_lambda: Annotated[float, typer.Option(help="upper bound of every multiplier")] = 1000.0,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """One-shot multipliers λ* from samples of the reference policy, with D(λ*) and the predicted means."""
    from constrained_dpo.dual import ScoreTable
    from constrained_dpo.one_shot import solve_one_shot
    from constrained_dpo.problem import ConstrainedProblem, Constraint
    from data_prep.tables import read_table

    if not 0 < max_lambda < float("inf"):
        raise UserError(f"--max-lambda {max_lambda}: must be a finite number > 0")
    margins = parse_assignments(constraint, "--constraint")
    problem = ConstrainedProblem(reward, beta, tuple(Constraint(n, margin=b) for n, b in margins.items()))
    frame = read_table(scores)
    if "source" in frame and not frame["source"].astype(str).str.startswith("reference").all():
        raise UserError(f"{scores}: holds responses that are not the reference policy's (column source); keep only those")
    solution = solve_one_shot(ScoreTable.from_frame(frame, problem), problem, max_lambda=max_lambda)
    values = {
        "lambda": solution.lambda_.to_dict(), "dual_value": solution.dual_value, "ess": solution.ess,
        "reward": solution.reward, "utilities": solution.utilities.to_dict(), "at_bound": list(solution.at_bound),
    }  # fmt: skip
    if as_json:
        print(json.dumps(values))
        return
    for name in problem.names:
        print(f"λ*({name}) = {solution.lambda_[name]:.6g}; predicted E[{name}] = {solution.utilities[name]:.6g}")
    print(f"D(λ*) = {solution.dual_value:.6g}; predicted E[{reward}] = {solution.reward:.6g}; mean ESS per prompt {solution.ess:.1f}")
    for name in solution.at_bound:
        why = f"these samples do not reach its margin within --max-lambda {max_lambda:g}"
        print(f"warning: λ*({name}) is at its bound: {why}; lower the margin or sample more", file=sys.stderr)
