"""`cdpo front`: the trade-off of a conditional run: a table, a figure, a page with a slider."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.options import AsJson, RunPath, parse_grids, print_json, results_console
from data_prep.errors import UserError

if TYPE_CHECKING:
    from constrained_dpo.api import Run

GRID = "NAME=LOW:HIGH:NUMBER or NAME=A,B,…"


Lambdas = Annotated[
    list[str],
    typer.Option(
        "--lambda", help=f"{GRID} multipliers, taken as they are; the others stay at the run's last"
    ),
]


Kappas = Annotated[
    str | None,
    typer.Option(
        "--kappa",
        help="A,B,…: how far from π_ref, κ = β of the recipe over β; alone: at the run's λ",
    ),
]


def front(
    run: RunPath,
    margins: Annotated[
        list[str],
        typer.Option(
            help=f"{GRID} margins, every combination of those given; a constraint that is not "
            "named stays at the recipe's margin; a threshold where the recipe has one. Default: "
            "the recipe's margins times 0 to 1.5"
        ),
    ] = [],
    lambda_: Lambdas = [],
    kappa: Kappas = None,
    responses: Annotated[
        int | None,
        typer.Option(min=2, help="responses per prompt; default: dual.responses_per_prompt"),
    ] = None,
    seed: Annotated[int, typer.Option(help="another seed draws other responses")] = 0,
    as_json: AsJson = False,
) -> None:
    """What each margin costs: λ, reward, utilities, KL, verdict and answers along the trade-off of
    a conditional run, without another fit."""
    from constrained_dpo.report.front_words import print_front

    opened = opened_family(run)
    from constrained_dpo.evaluation.front_source import FrontOptions

    options = FrontOptions(responses, seed)
    played = opened.front(
        parse_grids(margins, "--margins"),
        parse_grids(lambda_, "--lambda"),
        parse_kappas(kappa),
        options,
    )
    folder = opened.directory.front_file.parent
    if as_json:
        print_json(played.to_json() | {"page": str(folder / "front.html")})
        return
    print_front(results_console(170), played)
    print(f"{folder / 'front.html'}\n{folder}/*.png, front.json")


def opened_family(path: Path) -> "Run":
    """The run, before the libraries that play it are loaded; raises UserError where it has no
    family."""
    from constrained_dpo.evaluation.front import require_family
    from constrained_dpo.run.directory import RunDirectory

    directory = RunDirectory(path)
    require_family(directory, directory.recipe())
    from constrained_dpo.api import Run

    return Run(path)


def parse_kappas(text: str | None) -> list[float] | None:
    """A,B,… as numbers; raises UserError."""
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--kappa {text}: write numbers > 0, such as 0.5,1,1.5") from error
