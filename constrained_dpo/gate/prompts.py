"""The sets of prompts of a gate, none of which the run was trained on."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.evaluation.fresh import evaluation_prompts
from constrained_dpo.gate.claims import TEST
from constrained_dpo.gate.settings import GateSettings
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.prompts.messages import conversation_text, stored_prompt

LISTED = 3
"""Prompts that an error names; the rest are counted."""


@dataclass(frozen=True)
class PromptSet:
    """table: the prompts in the order in which looks take them, all with split test; source: the
    file, or None for the run's test prompts; duplicates: rows of the file left out."""

    table: pd.DataFrame
    source: str | None
    duplicates: int


def prompt_sets(run: RunDirectory, recipe: Recipe, settings: GateSettings) -> dict[str, PromptSet]:
    """Read every set of prompts by its name: the gate's, and those of single checks.

    The order is that of the prompts' hashes, so every look takes a random draw of the set. Raises
    UserError for rows that cannot be read, and where a prompt is one that the run trained on.
    """
    sources: dict[str, str | None] = {TEST: settings.prompts}
    if settings.checks.refusal is not None:
        sources["refusal"] = settings.checks.refusal.prompts
    for check in settings.checks.second_opinion:
        if check.prompts is not None:
            sources[check.name] = check.prompts
    trained = _trained(run, recipe)
    sets = {}
    for name, source in sources.items():
        file = None if source is None else Path(source)
        if file is not None and not file.exists():
            raise UserError(f"{source}: no such file; the gate's set {name} has no prompts")
        columns = recipe.category_columns if name == TEST else []
        table, duplicates = evaluation_prompts(run, recipe, file, columns)
        _require_unseen(table, trained, recipe, name if source is None else source)
        table = table.sort_values("prompt_id", ignore_index=True)
        sets[name] = PromptSet(table, source, duplicates)
    return sets


def normalized(prompt: str, format: str) -> str:
    """A prompt's text as two writers of the same prompt would have it: compatible characters in one
    form, lower case, single spaces."""
    text = conversation_text(stored_prompt(prompt, format))
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _trained(run: RunDirectory, recipe: Recipe) -> set[str]:
    """The normalized texts of the run's fit and dual prompts."""
    prompts = run.prompts()
    seen = prompts.loc[prompts["split"] != "test", "prompt"]
    return {normalized(prompt, recipe.prompts.format) for prompt in seen}


def _require_unseen(table: pd.DataFrame, trained: set[str], recipe: Recipe, where: str) -> None:
    texts = [normalized(prompt, recipe.prompts.format) for prompt in table["prompt"]]
    rows = [row for row, text in enumerate(texts) if text in trained]
    if not rows:
        return
    shown = "; ".join(f"prompt {row + 1}: {texts[row][:60]!r}" for row in rows[:LISTED])
    more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    raise UserError(
        f"{where} prompts: the run was trained on {len(rows)} of them ({shown}{more}), which says "
        "nothing of unseen ones; remove them, or give other `prompts`"
    )
