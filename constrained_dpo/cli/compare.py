"""`cdpo compare`: several runs beside each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.options import AsJson, print_json, results_console

if TYPE_CHECKING:
    from rich.console import Console

    from constrained_dpo.experiments.compare import Group


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
        print_json({"groups": parts, "left_out": missing, "files": [str(file) for file in files]})
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
