"""`cdpo`: init, check, prepare, round, run, status, report, dual, data. Results on stdout, progress
on stderr, a user's mistake exits 2."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.compare import compare, sweep_command
from constrained_dpo.cli.dual import app as dual_app
from constrained_dpo.cli.evaluate import evaluate, export
from constrained_dpo.cli.options import AsJson, Overrides, RoundChoice, RunPath, results_console
from constrained_dpo.cli.prealign import prealign
from constrained_dpo.launch import (
    check_launch,
    is_main,
    join_launch,
    main_first,
    may_speak,
    num_processes,
    run_launched,
    wait,
)
from data_prep.cli import app as data_app
from data_prep.console import parse_assignments, quiet_libraries, run_app
from data_prep.errors import UserError

if TYPE_CHECKING:
    from constrained_dpo.learners.lora import LoraLearner
    from constrained_dpo.recipe.schema import Recipe
    from constrained_dpo.run.directory import RunDirectory


app = typer.Typer(
    name="cdpo",
    no_args_is_help=True,
    help="As helpful as possible, at least this much safer: constrained alignment by DPO and a "
    "dual step.",
)


app.add_typer(dual_app, name="dual")
app.add_typer(data_app, name="data")
app.command()(prealign)
app.command()(evaluate)
app.command()(export)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@app.command()
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

    from constrained_dpo.run.create import init_run
    from constrained_dpo.run.directory import RunDirectory

    created = init_run(recipe, run, overrides, RunDirectory(source) if source else None)
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(created.path),
                    "name": created.recipe().name,
                    "recipe_hash": created.recipe().hash(),
                }
            )
        )
        return
    print(
        f"{created.path}: {created.recipe().name}\n{created.recipe().problem.describe()}\nnext: "
        f"cdpo run {created.path}"
    )


@app.command()
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
    from constrained_dpo.run.directory import RunDirectory

    if target.is_dir():
        run = RunDirectory(target)
        run.recipe()
        _check_history(run, as_json)
        return
    recipe, wanted = load_recipe(target, overrides), parse_assignments(target_se, "--target-se")
    _stay_offline()
    quiet_libraries()
    from constrained_dpo.check.check import check_recipe
    from constrained_dpo.progress import print_phase
    from constrained_dpo.report.check_text import print_check

    report = check_recipe(
        recipe,
        pilot=pilot,
        target_se=wanted,
        announce=print_phase,
        show_progress=sys.stderr.isatty(),
    )
    if as_json:
        print(json.dumps(report))
        return
    print(recipe.problem.describe())
    print_check(results_console(), report)


def _stay_offline() -> None:
    """A check downloads nothing; the hub's library reads this when it is imported."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"


def _check_history(run: "RunDirectory", as_json: bool) -> None:
    import pandas as pd

    from constrained_dpo.check.score_scale import describe_scale, score_scale
    from constrained_dpo.run.record import replay
    from data_prep.tables import read_parquet

    state, recipe = run.state(), run.recipe()
    if not state["lambda"] and not as_json:
        print(f"{run.path}: not prepared yet; nothing to check")
        return
    recomputed = replay(run) if state["lambda"] else []
    for number, (stored, again) in enumerate(zip(state["lambda"], recomputed, strict=True)):
        if stored != again:
            raise UserError(
                f"{run.state_file}: λ of round {number} is {stored}, but the run's tables and "
                f"recipe give {again}"
            )
    scale = None
    if recomputed:
        drawn = run.reference_file if recipe.pool.source == "dataset" else run.pool_file(None)
        pool = read_parquet(drawn, ["prompt_id", *recipe.problem.objectives])
        scale = score_scale(
            pool, recipe.problem, pd.Series(recomputed[0], dtype=float), "λ_0 of the run"
        )
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(run.path),
                    "recomputed": len(recomputed),
                    "lambda": recomputed,
                    "scale": scale,
                }
            )
        )
        return
    print(
        f"{run.path}: λ_0 and {len(recomputed) - 1} dual steps recomputed from the tables and the "
        "recipe, equal to state.json"
    )
    print("\n".join(describe_scale(scale, recipe.objective.beta, recipe.fit)))


def _open(run: "RunDirectory") -> tuple["Recipe", "LoraLearner", dict[str, int]]:
    """Recipe, learner and counts of prompts left out, of a run that is prepared or not yet."""
    from constrained_dpo.learners.lora import LoraLearner
    from constrained_dpo.tracking import require_trackers
    from data_prep.prompts.split import split_prompts

    quiet_libraries()
    recipe = run.recipe()
    require_trackers(recipe.fit.report_to)  # before hours of sampling, not after
    check_launch(recipe.policy)
    prepared = bool(run.state()["lambda"])
    prompts, left_out = (
        (run.prompts(), {})
        if prepared
        else split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    )
    learner = LoraLearner(recipe, run, prompts, show_progress=sys.stderr.isatty())
    with main_first():
        _ = learner.policy  # merged, trained or downloaded once
    if not prepared:
        left_out |= learner.restrict(recipe.fit.max_length)
    return recipe, learner, left_out


@contextmanager
def _held(run: "RunDirectory") -> Iterator[None]:
    """Holds the run: in a launch the main process has the lock, and the others begin once it has
    it."""
    with run.locked() if is_main() else nullcontext():
        wait()
        yield


def _prepare(run: "RunDirectory") -> tuple["Recipe", "LoraLearner"]:
    from constrained_dpo.progress import print_phase
    from constrained_dpo.report.words import at_bound_warning
    from constrained_dpo.run.prepare import prepare as prepare_run
    from constrained_dpo.run.prepare import require_same_inputs
    from constrained_dpo.run.scorer_facts import prepared_lines

    recipe, learner, left_out = _open(run)
    if run.state()["lambda"]:
        require_same_inputs(run, learner)
        return recipe, learner
    recipe = prepare_run(run, recipe, learner, left_out, print_phase)
    for line in prepared_lines(run, recipe):
        _say(f"prepare: {line}")
    for name, value in run.state()["lambda"][0].items():
        if value >= recipe.dual.max_lambda:
            _say(at_bound_warning(name))
    return recipe, learner


@app.command()
def prepare(run: RunPath, as_json: AsJson = False) -> None:
    """Sample and score the reference policy, measure its utilities, find the first multipliers."""
    from constrained_dpo.report.words import describe_answers
    from constrained_dpo.run.directory import RunDirectory

    directory = RunDirectory(run)
    with _held(directory):
        _prepare(directory)
    state = directory.state()
    if as_json:
        splits = {split: int(n) for split, n in directory.prompts()["split"].value_counts().items()}
        found = {
            "run": str(run),
            "lambda": state["lambda"][0],
            "prompts": splits,
            "left_out": state["left_out"],
        }
        print(
            json.dumps(
                found
                | {
                    "dataset": directory.dataset_record(),
                    "levels": directory.recipe().problem.bounds.to_dict(),
                }
            )
        )
        return
    print(f"{run}: prepared; λ_0 = {state['lambda'][0]}")
    print("prompts left out: " + ", ".join(f"{n} {why}" for why, n in state["left_out"].items()))
    if (counts := directory.dataset_record()) is not None:
        print(describe_answers(counts))


def _play(
    path: Path,
    rounds: int | None,
    as_json: bool,
    until_converged: bool = False,
    forced: bool = False,
) -> None:
    """Plays up to `rounds` more rounds (None: as many as the recipe's dual.rounds leaves) and
    prints the last one's table.

    Stops earlier where the run has converged (if asked to) or where no λ can meet the constraints;
    `forced`: not before the first one.
    """
    from constrained_dpo.progress import print_phase
    from constrained_dpo.report.words import print_round, print_samples
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.rounds import play_round
    from constrained_dpo.run.steering import reason_to_stop

    run = RunDirectory(path)
    with _held(run):
        recipe, done = run.recipe(), run.rounds_done()
        total = recipe.dual.rounds if rounds is None else done + rounds
        stop = reason_to_stop(run, recipe, until_converged) if done and not forced else None
        if done >= total or stop:
            if as_json:
                print(json.dumps(run.round_record(done - 1) | {"stopped": stop}))
            else:
                said = stop or f"all {total} rounds are done"
                print(f"{path}: {said}; `cdpo round` plays another, `cdpo status` shows them")
            return
        recipe, learner = _prepare(run)
        while run.rounds_done() < total and not stop:
            record = play_round(run, recipe, learner, print_phase)
            problem = recipe.problem
            summary = "; ".join(
                f"{n}: λ {record['lambda'][n]:.4f} → {record['lambda_next'][n]:.4f}, u "
                f"{record['u'][n]:+.3f}"
                for n in problem.names
            )
            _say(
                f"round {record['round']} done: {summary}; E[{problem.reward}] "
                f"{record['reward']:+.3f}; {record['verdict']} on test"
            )
            stop = reason_to_stop(run, recipe, until_converged)
    if as_json:
        print(json.dumps(record | {"stopped": stop}))
        return
    if stop:
        _say(stop)
    console = results_console()
    print_round(console, run, record, problem, recipe.dual.confidence)
    print_samples(console, run, record["round"], problem.objectives)


@app.command("round")
def play_one(run: RunPath, as_json: AsJson = False) -> None:
    """One dual iteration: relabel, fit, re-score, dual step. Prepares first where needed; resumes a
    killed round."""
    _play(run, 1, as_json, forced=True)


@app.command("run")
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
    _play(run, rounds, as_json, until_converged)


@app.command()
def status(run: RunPath, as_json: AsJson = False) -> None:
    """Where a run stands and what happens next."""
    from constrained_dpo.report.words import print_status
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.status import status as read_status

    content = read_status(RunDirectory(run))
    if as_json:
        print(json.dumps(content))
    else:
        print_status(results_console(), content)


@app.command()
def report(run: RunPath, round_: RoundChoice = "last", as_json: AsJson = False) -> None:
    """One HTML page with figures: verdict, rounds, scores and samples before and after, from the
    run's files."""
    from constrained_dpo.report.run_page import write_report
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.selection import chosen_round

    directory = RunDirectory(run)
    path, sentence = write_report(
        directory, None if round_ == "last" else chosen_round(directory, round_)
    )
    print(
        json.dumps({"report": str(path), "verdict": sentence}) if as_json else f"{sentence}\n{path}"
    )


app.command()(compare)
app.command()(sweep_command(_prepare))

LAUNCHED = ("prepare", "round", "run")


def _run_with_others() -> None:
    """The command as one process of `accelerate launch`."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    join_launch()
    if command not in LAUNCHED:
        raise UserError(
            f"cdpo {command}: runs in one process; start it without `accelerate launch` "
            f"({', '.join(LAUNCHED)} take several)"
        )
    app()


def main() -> None:
    if num_processes() == 1:
        run_app(app)
    else:
        run_launched(lambda: run_app(_run_with_others, may_speak))


if __name__ == "__main__":
    main()
