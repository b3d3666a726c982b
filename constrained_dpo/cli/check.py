"""`cdpo check`: a recipe before it is played, or a run's history."""

import os
from pathlib import Path
from typing import Annotated

import typer

from constrained_dpo.cli.options import AsJson, Overrides, print_json, results_console
from data_prep.console import parse_assignments


def check(
    target: Annotated[Path, typer.Argument(help="recipe YAML or run directory")],
    overrides: Overrides = [],
    pilot: Annotated[
        bool,
        typer.Option(help="sample, score and fit a little: precision of u and minutes per phase"),
    ] = True,
    target_se: Annotated[
        list[str], typer.Option(help="CONSTRAINT=SE wanted of u; default: a tenth of its margin")
    ] = [],
    as_json: AsJson = False,
) -> None:
    """Validate a recipe without training (data, policy, scorers, lengths, cost), or a run's λ
    history against its tables."""
    from constrained_dpo.recipe.load import load_recipe

    if target.is_dir():
        _check_run(target, as_json)
        return
    recipe, errors = load_recipe(target, overrides), parse_assignments(target_se, "--target-se")
    # A check downloads nothing; the hub's library reads this when it is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from constrained_dpo.check.check import check_recipe
    from constrained_dpo.report.check_words import print_check

    report = check_recipe(recipe, pilot=pilot, target_se=errors)
    if as_json:
        print_json(report.to_json())
        return
    print(recipe.problem.describe())
    print_check(results_console(), report, recipe)


def _check_run(target: Path, as_json: bool) -> None:
    from constrained_dpo.check.history import check_history
    from constrained_dpo.report.check_words import describe_scale
    from constrained_dpo.run.directory import RunDirectory

    run = RunDirectory(target)
    recipe = run.recipe()
    history = check_history(run)
    if as_json:
        print_json(history.to_json() | {"recomputed": len(history.lambda_)})
    elif history.scale is None:
        print(f"{target}: not prepared yet; nothing to check")
    else:
        print(
            f"{target}: λ_0 and {len(history.lambda_) - 1} dual steps recomputed from the tables "
            "and the recipe, equal to state.json"
        )
        print("\n".join(describe_scale(history.scale, recipe.objective.beta, recipe.fit)))
