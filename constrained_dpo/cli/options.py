"""What several `cdpo` commands have in common: their arguments, and how results are written."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


RunPath = Annotated[Path, typer.Argument(help="run directory")]


AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]


RoundChoice = Annotated[
    str, typer.Option("--round", help="a round's number, best, best-dual or last")
]


AdapterChoice = Annotated[
    Path | None,
    typer.Option(
        "--adapter", help="instead of a round: a LoRA adapter from elsewhere on the run's base"
    ),
]


Overrides = Annotated[
    list[str], typer.Option("-s", "--set", help="KEY=VALUE, dotted keys, e.g. objective.beta=0.1")
]


def print_json(content: object) -> None:
    """Print a result for machines; a number that is not finite is an error."""
    print(json.dumps(content, allow_nan=False))


def results_console(width: int = 140) -> "Console":
    """Results: no markup (texts may hold brackets); `width` columns where a file or pipe reads."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else width, markup=False, emoji=False, highlight=False
    )


def parse_grids(options: list[str], option: str) -> dict[str, list[float]]:
    """NAME=LOW:HIGH:NUMBER or NAME=A,B,… as values by name; raises UserError."""
    import numpy as np

    grids: dict[str, list[float]] = {}
    for text in options:
        name, _, value = text.partition("=")
        try:
            if not name or name in grids:
                raise ValueError
            if ":" in value:
                low, high, number = value.split(":")
                grids[name] = np.linspace(float(low), float(high), int(number)).tolist()
            else:
                grids[name] = [float(v) for v in value.split(",")]
            if not grids[name]:
                raise ValueError
        except ValueError as error:
            raise UserError(
                f"{option} {text}: write NAME=LOW:HIGH:NUMBER or NAME=A,B,…, each name once"
            ) from error
    return grids
