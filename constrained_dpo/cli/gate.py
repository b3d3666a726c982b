"""`cdpo gate`: whether a policy may be released. Exit code 0 passed, 1 failed, 3 undecided; a
user's mistake exits 2."""

from pathlib import Path
from typing import Annotated

import typer

from constrained_dpo.cli.options import AdapterChoice, AsJson, RoundChoice, RunPath, print_json
from data_prep.errors import UserError
from data_prep.files import write_atomically

EXIT_CODES = {"passed": 0, "failed": 1, "undecided": 3}


def gate(
    run: RunPath,
    settings: Annotated[Path, typer.Argument(metavar="GATE", help="gate.yaml: the checks")],
    round_: RoundChoice = "last",
    adapter: AdapterChoice = None,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided", help="look at more and more prompts until each check is decided"
        ),
    ] = False,
    budget: Annotated[
        int | None,
        typer.Option(
            min=2, help="with --until-decided: at most so many prompts; default: all there are"
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="write JUnit XML to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write Markdown to this file")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a policy before it is released: exit code 0 passed, 1 failed, 3 undecided, 2 a
    mistake."""
    from constrained_dpo.gate.settings import load_gate
    from constrained_dpo.report.gate_words import (
        UNFINISHED,
        gate_junit,
        gate_lines,
        gate_markdown,
        unfinished_junit,
    )
    from constrained_dpo.run.directory import RunDirectory

    checks = load_gate(settings)
    for file in (junit, markdown):
        if file is not None and file.resolve() == settings.resolve():
            raise UserError(f"{file}: is the gate itself; write the result to another file")
    # An old pass must not be read as this gate's where it ends with an error.
    _write(junit, unfinished_junit())
    _write(markdown, UNFINISHED.encode())
    directory = RunDirectory(run)
    directory.recipe()
    from constrained_dpo.gate.gate import GateOptions
    from constrained_dpo.gate.gate import gate as judge

    options = GateOptions(round_, adapter, until_decided, budget)
    record = judge(directory, checks, options)
    policy = f"{run}, {f'round {record.round}' if adapter is None else adapter}"
    _write(junit, gate_junit(record, policy))
    _write(markdown, gate_markdown(record, policy).encode())
    if as_json:
        print_json(record.to_json())
    else:
        print("\n".join([*gate_lines(record), f"tables: {directory.gate_folder(record.key)}"]))
    raise typer.Exit(EXIT_CODES[record.verdict])


def _write(file: Path | None, content: bytes) -> None:
    if file is not None:
        write_atomically(file, content)
