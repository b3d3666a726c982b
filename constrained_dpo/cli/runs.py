"""`cdpo init`, `prepare`, `round`, `run`, `status`, `report`: a run from its recipe to its page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.follow import follow_run
from constrained_dpo.cli.options import (
    AsJson,
    Overrides,
    RoundChoice,
    RunPath,
    print_json,
    results_console,
)
from data_prep.errors import UserError
from data_prep.settings import EMBEDDED

if TYPE_CHECKING:
    from constrained_dpo.api import Run


def init(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    run: RunPath,
    overrides: Overrides = [],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="a prepared run whose reference samples and scores are used again (other "
            "margins, β)",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Freeze a recipe into a run directory."""
    from constrained_dpo.report.words import EMBEDDED_WORLD
    from constrained_dpo.run.create import init_run
    from constrained_dpo.run.directory import RunDirectory

    created = init_run(recipe, run, overrides, RunDirectory(source) if source else None)
    frozen = created.recipe()
    if as_json:
        print_json({"run": str(run), "name": frozen.name, "recipe_hash": frozen.hash()})
        return
    if frozen.policy.model == EMBEDDED:
        print(EMBEDDED_WORLD)
    print(f"{run}: {frozen.name}\n{frozen.problem.describe()}\nnext: cdpo run {run}")


def _opened(path: Path) -> "Run":
    """The run, before the libraries that play it are loaded."""
    from constrained_dpo.run.directory import RunDirectory

    RunDirectory(path).recipe()
    from constrained_dpo.api import Run

    return Run(path)


def prepare(run: RunPath, as_json: AsJson = False) -> None:
    """Sample and score the reference policy, measure its utilities, find the first multipliers."""
    from constrained_dpo.report.cells import at_bound_warning
    from constrained_dpo.report.scorer_words import prepared_lines
    from constrained_dpo.report.status_words import describe_answers

    opened = _opened(run)
    lambda_, directory = opened.prepare(), opened.directory
    state, recipe, dataset = directory.state(), opened.recipe, directory.dataset_record()
    if as_json:
        print_json(
            {
                "run": str(run),
                "lambda": lambda_,
                "prompts": directory.prompts()["split"].value_counts().to_dict(),
                "left_out": state.left_out,
                "dataset": dataset,
                "levels": recipe.problem.bounds.to_dict(),
            }
        )
        return
    print("\n".join(prepared_lines(directory, recipe)))
    print(f"{run}: prepared; λ_0 = {lambda_}")
    for name, value in lambda_.items():
        if value >= recipe.dual.max_lambda:
            print(at_bound_warning(name))
    print("prompts left out: " + ", ".join(f"{n} {why}" for why, n in state.left_out.items()))
    if dataset is not None:
        print(describe_answers(dataset))


def _play(
    path: Path,
    rounds: int | None,
    as_json: bool,
    *,
    until_converged: bool = False,
    forced: bool = False,
) -> None:
    """Plays, and prints the last round's lines."""
    from constrained_dpo.report.words import print_round

    run = _opened(path)
    played = run.play(rounds, until_converged=until_converged, forced=forced)
    record = played.records[-1] if played.records else run.record()
    if as_json:
        print_json(record.to_json() | {"stopped": played.stopped})
    elif played.records:
        print_round(results_console(), run.directory, record, played.stopped)
    else:
        reason = played.stopped or f"all {run.recipe.dual.rounds} rounds are done"
        print(f"{path}: {reason}; `cdpo round` plays another, `cdpo status` shows them")


def play_one(run: RunPath, as_json: AsJson = False) -> None:
    """One dual iteration: relabel, fit, re-score, dual step. Prepares first where needed; resumes a
    killed round."""
    _play(run, 1, as_json, forced=True)


def play_all(
    run: RunPath,
    rounds: Annotated[
        int | None,
        typer.Option(help="how many more rounds; default: up to the recipe's dual.rounds"),
    ] = None,
    until_converged: Annotated[
        bool,
        typer.Option(
            "--until-converged",
            help="stop when the constraints are met and λ rests (dual.tolerance, dual.target_gap)",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """All rounds of the recipe; fewer where the margins turn out to be out of reach."""
    if rounds is not None and rounds < 1:
        raise UserError(f"--rounds {rounds}: must be at least 1")
    _play(run, rounds, as_json, until_converged=until_converged)


def status(
    run: RunPath,
    full: Annotated[
        bool, typer.Option("--full", help="also the last round's tables and sample answers")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="show it while a process plays the run; Ctrl-C ends")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Where a run stands, what is under way and what happens next."""
    from constrained_dpo.report.status_words import activity_line, certificate_line, print_status
    from constrained_dpo.report.words import print_samples, print_tables
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.status import read_activity, read_status

    directory = RunDirectory(run)
    if follow:
        if full or as_json:
            raise UserError(f"--follow: is shown without {'--full' if full else '--json'}; drop it")
        follow_run(results_console(), directory)
        return
    content, activity = read_status(directory), read_activity(directory)
    if as_json:
        words = certificate_line(content.rounds) if content.rounds else None
        now = None if activity is None else activity.to_json()
        print_json(content.to_json() | {"certificate": words, "activity": now})
        return
    console = results_console()
    print_status(console, content)
    if activity is not None:
        console.print(activity_line(activity))
    if full and content.rounds:
        print_tables(console, directory, content.rounds[-1])
        print_samples(console, directory, content.rounds[-1].round)


def report(run: RunPath, round_: RoundChoice = "last", as_json: AsJson = False) -> None:
    """One HTML page with figures: verdict, rounds, scores and samples before and after, from the
    run's files."""
    from constrained_dpo.report.run_page import write_report
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.steering import chosen_round

    directory = RunDirectory(run)
    number = None if round_ == "last" else chosen_round(directory, round_)
    path, sentence = write_report(directory, number)
    if as_json:
        print_json({"report": str(path), "verdict": sentence})
    else:
        print(f"{sentence}\n{path}")
