"""`cdpo compare` and `cdpo sweep`: several runs beside each other. Results on stdout, progress on
stderr, a user's mistake exits 2."""

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.dual import parse_grids
from constrained_dpo.cli.options import AsJson, results_console
from data_prep.console import parse_assignments
from data_prep.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from constrained_dpo.experiments.compare import Group
    from constrained_dpo.experiments.sweep import Prepare


HTML_PROMPTS = 10  # prompts shown on the page where --samples names no number


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories")],
    round_: Annotated[
        str, typer.Option("--round", help="of every run: a round's number, best, best-dual or last")
    ] = "last",
    samples: Annotated[
        int, typer.Option(min=0, help="also show so many test prompts with the answers of all runs")
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="folder for compare.html, compare.md, compare.csv, PNGs"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Runs beside each other on their test prompts: gains against margins, reward, KL, certificate,
    time; figures with --output."""
    from constrained_dpo.experiments.compare import read_groups

    groups, left_out = read_groups(runs, round_)
    show(groups, left_out, output, samples, as_json)


def show(
    groups: "list[Group]",
    left_out: list[tuple[str, str]],
    output: Path | None,
    samples: int,
    as_json: bool,
) -> None:
    """Writes and prints a comparison."""
    from constrained_dpo.experiments.compare import group_values, side_by_side
    from constrained_dpo.report.comparison_page import write_comparison

    files = (
        []
        if output is None
        else write_comparison(groups, left_out, output, samples or HTML_PROMPTS)
    )
    if as_json:
        parts = [
            group_values(group) | ({"samples": side_by_side(group, samples)} if samples else {})
            for group in groups
        ]
        missing = [{"run": name, "reason": reason} for name, reason in left_out]
        print(
            json.dumps(
                {"groups": parts, "left_out": missing, "files": [str(file) for file in files]}
            )
        )
        return
    console = results_console(180)
    for number, group in enumerate(groups, 1):
        if len(groups) > 1:
            console.print(
                f"group {number}"
                + (f": not comparable with group 1: {group.apart}" if group.apart else "")
            )
        _print_group(console, group)
        if samples:
            _print_samples(console, side_by_side(group, samples))
    for name, reason in left_out:
        console.print(f"left out: {name}: {reason}")
    if files:
        print(files[-1])


def _print_group(console: "Console", group: "Group") -> None:
    from rich.table import Table

    from constrained_dpo.report.comparison_text import means_table, text_table

    for content in (text_table(group), means_table(group)):
        if content is None:
            continue
        table = Table(show_lines=True)
        for index, name in enumerate(content.header):
            table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        for row in content.rows:
            table.add_row(*row)
        console.print(table)
        for note in content.notes:
            console.print(note)


def _print_samples(console: "Console", cards: list[dict]) -> None:
    from rich.table import Table

    for card in cards:
        table = Table(title=card["prompt"], title_justify="left", show_lines=True)
        for name in ("policy", "answer (its first draw)", "scores"):
            table.add_column(name, overflow="fold")
        for answer in card["answers"]:
            scores = ", ".join(f"{name} {value:+.2f}" for name, value in answer["scores"].items())
            text = (answer["response"] or "(nothing)") + (" (cut off)" if answer["cut_off"] else "")
            table.add_row(answer["who"], text, scores)
        console.print(table)


def sweep_command(prepare: "Prepare") -> Callable[..., None]:
    """The command `sweep`; prepare: how a run is opened and prepared (`cdpo prepare`'s way)."""

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
            typer.Option(
                help="a,b,…: recipe, caid, mocan, ours, weighted_sum, dpo_NAME (NAME alone)"
            ),
        ] = "recipe",
        weights: Annotated[
            list[str],
            typer.Option(help="λ of weighted_sum: NAME=A,B,…; every combination is played"),
        ] = [],
        seeds: Annotated[str, typer.Option(help="a,b,…; default: the recipe's seed")] = "",
        overrides: Annotated[
            list[str], typer.Option("-s", "--set", help="KEY=VALUE for all runs, dotted keys")
        ] = [],
        round_: Annotated[
            str,
            typer.Option(
                "--round",
                help="which round the comparison shows: best, best-dual, last or a number",
            ),
        ] = "last",
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="print the runs as commands and play nothing")
        ] = False,
        as_json: AsJson = False,
    ) -> None:
        """One recipe under many margins, methods and seeds on shared pools, then their comparison;
        the same command resumes."""
        from constrained_dpo.experiments.sweep import plan_sweep, play_sweep
        from constrained_dpo.progress import print_phase
        from constrained_dpo.recipe.load import load_recipe

        planned = plan_sweep(
            recipe,
            output,
            overrides=overrides,
            methods=[m.strip() for m in method.split(",")],
            margins=_settings(margin, margins, pairs),
            weights=_combinations(weights, "--weights") if weights else [],
            seeds=_seeds(seeds) if seeds else [load_recipe(recipe, overrides).seed],
        )
        if dry_run:
            commands = list(dict.fromkeys(line for run in planned for line in run.commands(recipe)))
            print(
                json.dumps({"runs": [str(run.path) for run in planned], "commands": commands})
                if as_json
                else "\n".join(commands)
            )
            return
        play_sweep(
            recipe,
            planned,
            prepare,
            lambda line: print(line, file=sys.stderr, flush=True),
            print_phase,
        )
        from constrained_dpo.experiments.compare import read_groups

        groups, left_out = read_groups([run.path for run in planned], round_)
        show(groups, left_out, output / "comparison", 0, as_json)

    return sweep


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
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seeds {text}: write integers ≥ 0 separated by commas, e.g. 0,1,2")
    return [int(part) for part in parts]
