"""`cdpo prealign`: a DPO adapter on a dataset's own labels. The last line on stdout, or the JSON,
says what it was fitted on."""

from pathlib import Path
from typing import Annotated

import typer

from constrained_dpo.cli.options import AsJson, Overrides, print_json
from data_prep.errors import UserError


def prealign(
    recipe: Annotated[
        Path, typer.Argument(help="recipe YAML: its policy, prompts.source, LoRA and fit settings")
    ],
    output: Annotated[Path, typer.Argument(help="new folder for the adapter")],
    labels: Annotated[
        str | None,
        typer.Option(
            help="better_response_id, safer_response_id, or chosen for rows of chosen and "
            "rejected; default: fit.label_column"
        ),
    ] = None,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """DPO on a dataset's human labels: the adapters of PeCAID's implicit scorers, and the baselines
    DPO-helpful and DPO-safe."""
    from constrained_dpo.recipe.load import load_recipe
    from constrained_dpo.report.status_words import describe_answers

    settings = load_recipe(recipe, overrides)
    column = labels or settings.fit.label_column
    if column is None:
        raise UserError(
            "cdpo prealign: which label? give --labels better_response_id, safer_response_id or "
            "chosen"
        )
    from constrained_dpo.experiments.prealign import prealign as fit_labels

    facts = fit_labels(settings, column, output)
    if as_json:
        print_json({"output": str(output)} | facts)
        return
    print(
        f"{output}: adapter fitted on {facts['pairs']} pairs labelled {column}, β {facts['beta']:g}"
    )
    print(describe_answers(facts["answers"]))
    for split, agreement in facts["agreement"].items():
        if agreement is not None:
            share, low, high = (100 * agreement[key] for key in ("share", "low", "high"))
            print(
                f"{split}: β·log π/π_ref prefers the labelled answer in {share:.1f} % "
                f"[{low:.1f}, {high:.1f}] of {agreement['pairs']} pairs"
            )
