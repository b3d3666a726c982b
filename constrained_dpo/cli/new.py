"""`cdpo new`: a recipe written after a look at a model, prompts and scorers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.options import AsJson, print_json
from data_prep.errors import UserError

if TYPE_CHECKING:
    from constrained_dpo.draft.draft import Draft

SPEC = "file.py:function, a model's folder or hub id, or {type: ...} as in a recipe"


def new(
    recipe: Annotated[Path, typer.Argument(help="YAML file to write")],
    policy: Annotated[
        str | None, typer.Option(help="folder or hub id of a causal language model")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="file of prompts (csv, jsonl, parquet, txt, ...) or a folder")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help=f"[NAME=]SPEC of the reward; SPEC: {SPEC}")
    ] = None,
    constraint: Annotated[
        list[str], typer.Option(help="NAME=SPEC of a utility, once per constraint")
    ] = [],
    margin: Annotated[
        list[str],
        typer.Option(help="NAME=NUMBER in score units, or NAME=0.5std; default: proposed"),
    ] = [],
    copy: Annotated[
        str | None,
        typer.Option(help="instead: a recipe that ships with the toolkit, e.g. quickstart"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe after a look at a model, prompts and scorers; on a terminal, ask for
    what was not given."""
    from constrained_dpo.draft.draft import Draft, Wish, copy_shipped, require_new, write_draft
    from constrained_dpo.draft.specs import named_scorer

    require_new(recipe)
    given = {"policy": policy, "prompts": prompts, "reward": reward, "constraint": constraint}
    if copy is not None:
        if odd := [f"--{name}" for name, value in given.items() if value] or margin:
            raise UserError(f"--copy writes a recipe as it is; drop {odd[0]}, or --copy")
        _show(recipe, Draft(copy_shipped(recipe, copy), None, []), as_json)
        return
    missing = [f"--{name}" for name, value in given.items() if not value]
    if missing and not sys.stdin.isatty():
        raise UserError(f"cdpo new: give {', '.join(missing)} too; on a terminal it asks for them")
    policy = policy or _asked("policy, the folder or hub id of a language model", str)
    prompts = prompts or _asked("prompts, a file or folder", str)
    if missing:
        print(f"A scorer is {SPEC}.", file=sys.stderr)
    reward = reward or _asked(
        "reward, what is to be as high as possible: [NAME=]SCORER",
        lambda text: named_scorer(text, "reward", "reward"),
    )
    if not constraint:
        constraint, margin = _asked_constraints()
    wish = Wish(policy, prompts, reward, constraint, margin)
    _show(recipe, write_draft(recipe, wish), as_json)


def _asked(question: str, read: Callable[[str], object], default: str | None = None) -> str:
    """Ask on the terminal until the answer can be read."""
    while True:
        answer = str(typer.prompt(question, default=default, show_default=False, err=True)).strip()
        try:
            if answer:
                read(answer)
            return answer
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _asked_constraints() -> tuple[list[str], list[str]]:
    """Ask for constraints and margins until an empty answer; there is one at least."""
    from constrained_dpo.draft.specs import named_scorer

    constraints, margins = list[str](), list[str]()
    question = "constraint, what must rise by a margin: [NAME=]SCORER"
    while answer := _asked(
        question, lambda text: named_scorer(text, "constraint"), "" if constraints else None
    ):
        name = named_scorer(answer, "constraint").name
        constraints.append(answer)
        margin = _asked(
            f"margin of {name}, a number or 0.5std (empty: proposed after a look)", str, ""
        )
        margins += [f"{name}={margin}"] if margin else []
        question = "one more constraint (empty: no more)"
    return constraints, margins


def _show(file: Path, draft: "Draft", as_json: bool) -> None:
    """Say what was written and seen."""
    if as_json:
        print_json(
            {
                "recipe": str(file),
                "problem": draft.recipe.problem.describe(),
                "warnings": draft.warnings,
            }
        )
        return
    print(f"{file}: written; its lines say why\n{draft.recipe.problem.describe()}")
    if draft.trial is not None:
        answer = " ".join(draft.trial.example.split())[:80]
        print(
            f"seen: {draft.trial.answers} answers of the model, {draft.trial.cut_off} cut off; one "
            f"of them: {answer!r}"
        )
    for warning in draft.warnings:
        print(f"warning: {warning}")
    print(f"next: cdpo check {file}")
