"""`cdpo sweep`: one recipe under many margins, methods and seeds."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from constrained_dpo.cli.compare import show
from constrained_dpo.cli.options import AsJson, parse_grids, print_json
from data_prep.console import parse_assignments
from data_prep.errors import UserError


def sweep(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    output: Annotated[
        Path, typer.Argument(help="folder of the runs, their shared pools and the comparison")
    ],
    margin: Annotated[
        list[str],
        typer.Option(help="NAME=A,B,… or NAME=LOW:HIGH:NUMBER; every combination is played"),
    ] = [],
    margins: Annotated[
        list[str],
        typer.Option(help="one setting, e.g. harmless=0.1,humor=0.45; repeat it for others"),
    ] = [],
    pairs: Annotated[
        Path | None, typer.Option(help="table of settings: a column per constraint, a row each")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="a,b,…: recipe, caid, mocan, ours, weighted_sum, dpo_NAME (NAME alone)"),
    ] = "recipe",
    weights: Annotated[
        list[str], typer.Option(help="λ of weighted_sum: NAME=A,B,…; every combination is played")
    ] = [],
    seeds: Annotated[str, typer.Option(help="a,b,…; default: the recipe's seed")] = "",
    overrides: Annotated[
        list[str], typer.Option("-s", "--set", help="KEY=VALUE for all runs, dotted keys")
    ] = [],
    round_: Annotated[
        str,
        typer.Option(
            "--round", help="which round the comparison shows: best, best-dual, last or a number"
        ),
    ] = "last",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the runs as commands and play nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One recipe under many margins, methods and seeds on shared pools, then their comparison; the
    same command resumes."""
    from constrained_dpo.recipe.load import load_recipe

    settings = load_recipe(recipe, overrides)
    from constrained_dpo.experiments.compare import read_groups
    from constrained_dpo.experiments.sweep import SweepGrid, plan_sweep, play_sweep

    grid = SweepGrid(
        methods=[name.strip() for name in method.split(",")],
        seeds=_seeds(seeds) if seeds else [settings.seed],
        margins=_settings(margin, margins, pairs),
        weights=_combinations(weights, "--weights") if weights else [],
    )
    planned = plan_sweep(recipe, output, overrides, grid)
    if dry_run:
        commands = list(dict.fromkeys(line for run in planned for line in run.commands(recipe)))
        if as_json:
            print_json({"runs": [str(run.path) for run in planned], "commands": commands})
        else:
            print("\n".join(commands))
        return
    play_sweep(recipe, planned)
    groups, left_out = read_groups([run.path for run in planned], round_)
    show(groups, left_out, output / "comparison", 0, as_json)


def _settings(margin: list[str], margins: list[str], pairs: Path | None) -> list[dict[str, float]]:
    """What the three ways of naming margins ask for; nothing: the recipe's own. Raises UserError
    where two of them are mixed."""
    from constrained_dpo.experiments.sweep import read_pairs

    if sum(map(bool, (margin, margins, pairs))) > 1:
        raise UserError(
            "--margin, --margins and --pairs: give one of them; --pairs holds any list of settings"
        )
    if pairs is not None:
        return read_pairs(pairs)
    if margins:
        return [parse_assignments(text.split(","), "--margins") for text in margins]
    return _combinations(margin, "--margin") if margin else [{}]


def _combinations(options: list[str], option: str) -> list[dict[str, float]]:
    grids = parse_grids(options, option)
    return [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise UserError(f"--seeds {text}: write integers ≥ 0 separated by commas, e.g. 0,1,2")
    return [int(word) for word in words]
