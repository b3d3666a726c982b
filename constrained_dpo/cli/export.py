"""`cdpo export`: a policy to take away. Results on stdout, a user's mistake exits 2."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.front import GRID, Kappas, Lambdas, opened_family, parse_kappas
from constrained_dpo.cli.options import (
    AsJson,
    RoundChoice,
    RunPath,
    parse_grids,
    print_json,
    results_console,
)
from data_prep.errors import UserError

if TYPE_CHECKING:
    from constrained_dpo.evaluation.export_members import Member


def export(
    run: RunPath,
    output: Annotated[Path, typer.Argument(help="new folder")],
    round_: RoundChoice = "last",
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="merge into the unquantized base (bfloat16) and measure the result again",
        ),
    ] = False,
    margin: Annotated[
        list[str],
        typer.Option(
            help=f"of a conditional run: {GRID} margins to meet, each by an adapter of its own, "
            "sampled afresh and judged; several lie in OUTPUT/NAME-MARGIN. A constraint that is "
            "not named stays at the recipe's margin"
        ),
    ] = [],
    lambda_: Lambdas = [],
    kappa: Kappas = None,
    as_json: AsJson = False,
) -> None:
    """Write a round's adapter, the merged model, or adapters for other margins, with a model
    card."""
    if margin or lambda_ or kappa is not None:
        if merge or round_ != "last":
            raise UserError(
                f"{'--merge' if merge else '--round'}: --margin, --lambda and --kappa write "
                "adapters of the last round's family; drop one of them"
            )
        grids = parse_grids(margin, "--margin"), parse_grids(lambda_, "--lambda")
        opened = opened_family(run)
        kappas = parse_kappas(kappa)
        _show(
            opened.export(output, margins=grids[0], lambda_=grids[1], kappa=kappas), output, as_json
        )
        return
    _export_round(run, output, round_, merge, as_json)


def _export_round(run: Path, output: Path, round_: str, merge: bool, as_json: bool) -> None:
    """Export a round's own adapter, or the merged model."""
    from constrained_dpo.report.words import print_evaluation
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.steering import chosen_round

    directory = RunDirectory(run)
    recipe, number = directory.recipe(), chosen_round(directory, round_)
    from constrained_dpo.api import Run

    measured = Run(run).export(output, number, merge=merge)
    facts: dict[str, object] = {"output": str(output), "round": number}
    if measured is not None:
        facts["measurement"] = measured.to_json()
    if as_json:
        print_json(facts)
    elif measured is None:
        print(f"{output}: adapter of round {number} and its model card (README.md)")
    else:
        print_evaluation(results_console(), measured, recipe)
        print(
            f"{output}: round {number} merged in bfloat16, its measurement (measurement.json) and "
            "its model card (README.md)"
        )


def _show(members: "Sequence[Member]", output: Path, as_json: bool) -> None:
    """Print what was written, what was measured of it, and how to serve it."""
    from constrained_dpo.evaluation.export_members import serve_line

    line = serve_line(members, output)
    if as_json:
        adapters = [
            {"name": m.name, "path": str(m.folder), "notices": m.notices()} | m.point.to_json()
            for m in members
        ]
        print_json({"output": str(output), "adapters": adapters, "serve": line})
        return
    for member in members:
        point = member.point
        slacks = ", ".join(
            f"{name}: λ {point.lambda_[name]:.4f}, u {point.test.u[name]:+.3f} "
            f"[{point.test.u_ci_low[name]:+.3f}, {point.test.u_ci_high[name]:+.3f}]"
            for name in point.lambda_
        )
        print(f"{member.folder}: {point.verdict}; {slacks}")
        for notice in member.notices():
            print(f"notice: {notice}")
    print(f"model card: {output / 'README.md'}\nserve: {line}")
