"""Prompts of files and datasets, and the split.

Rows come from `rows`, what is the prompt in them says `layouts`. A prompt's id is a hash of
its content, and so is its place in the split.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.prompts.categories import categories_of
from data_prep.prompts.layouts import prompt_of
from data_prep.prompts.rows import read_rows, source_name
from data_prep.prompts.settings import DatasetSource, PromptSettings
from data_prep.readers.rows import refuse_problems
from data_prep.tables import validate_prompts

T = TypeVar("T")


def parsed_rows(
    source: str | DatasetSource, parse: Callable[[dict], T], columns: Sequence[str] = ()
) -> Iterator[tuple[str, T]]:
    """Parse every row of a source: where it stands, and what `parse` makes of its content.

    columns: that `parse` reads beside a layout's. Raises UserError after the last one; it lists the
    rows for which `parse` raised ValueError.
    """
    broken: list[str] = []
    for row in read_rows(source, columns):
        try:
            if row.content is None:
                raise ValueError(row.problem)
            parsed = parse(row.content)
        except ValueError as error:
            broken.append(f"{row.where}: {error}")
            continue
        yield row.where, parsed
    refuse_problems(source_name(source), broken)


def read_prompts(source: str | DatasetSource, format: str) -> tuple[pd.Series, int]:
    """Unique prompts by prompt_id (a hash of the content), and how many duplicates were left out.

    Raises UserError listing the rows that cannot be read.
    """
    table, duplicates = read_prompt_table(source, format, ())
    return table["prompt"], duplicates


def read_prompt_table(
    source: str | DatasetSource, format: str, columns: Sequence[str]
) -> tuple[pd.DataFrame, int]:
    """Unique prompts by prompt_id, `prompt` and in `columns` their categories (`categories_of`),
    those of all duplicates together; and how many duplicates were left out.

    Raises UserError listing the rows that cannot be read.
    """
    prompts: dict[str, str] = {}
    categories: dict[str, dict[str, set[str]]] = {column: {} for column in columns}
    count = 0

    def parse(content: dict) -> tuple[str, list[list[str]]]:
        return prompt_of(content, format == "chat"), [categories_of(content, c) for c in columns]

    for _, (prompt, named) in parsed_rows(source, parse, columns):
        count += 1
        prompts[prompt_id(prompt)] = prompt
        for column, names in zip(columns, named, strict=True):
            categories[column].setdefault(prompt_id(prompt), set()).update(names)
    if not prompts:
        raise UserError(f"{source_name(source)}: no prompts in it")
    table = pd.DataFrame({"prompt": pd.Series(prompts)})
    for column in columns:
        table[column] = pd.Series({p: sorted(names) for p, names in categories[column].items()})
    return table, count - len(table)


def prompt_id(prompt: str) -> str:
    """The id of a prompt as it is stored: a hash of it."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def split_prompts(
    settings: PromptSettings, num_dual: int, columns: Sequence[str] = ()
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The prompts table with its split, and counts of what was left out (duplicates, in_test,
    over_max). columns: of the sources, that hold categories and are kept.

    Everything is decided by the prompts' hashes: test is the given source, or the fraction with the
    lowest hashes; dual is `num_dual` of the fit prompts. A fit prompt that is also a test prompt
    goes to test.
    """
    fit, duplicates = read_prompt_table(settings.source, settings.format, columns)
    left_out = {"duplicates": duplicates, "in_test": 0, "over_max": 0}
    if isinstance(settings.test, float):
        if not 0 < settings.test < 1:
            raise UserError(
                f"prompts.test: {settings.test} is neither a source nor a fraction between 0 and 1"
            )
        share = settings.test
        is_test = np.array([int(pid[:8], 16) / 2**32 < share for pid in fit.index])
        test, fit = fit[is_test], fit[~is_test]
    else:
        test, test_duplicates = read_prompt_table(settings.test, settings.format, columns)
        left_out["duplicates"] += test_duplicates
        left_out["in_test"] = int(fit.index.isin(test.index).sum())
        fit = fit[~fit.index.isin(test.index)]
    total = len(fit) + len(test)
    fit, test = fit.sort_index()[: settings.max_fit], test.sort_index()[: settings.max_test]
    left_out["over_max"] = total - len(fit) - len(test)
    if len(fit) < 2 or len(test) < 2:
        raise UserError(
            f"prompts: {len(fit)} fit and {len(test)} test prompts; both need at least 2 (change "
            "prompts.test or the source)"
        )
    # Another hash than the one that orders the fit prompts, so that dual is not the head of the
    # list.
    ranked = sorted(fit.index, key=lambda pid: hashlib.sha256(f"dual/{pid}".encode()).digest())
    dual = set(ranked[:num_dual])
    table = pd.concat([fit, test]).rename_axis("prompt_id").reset_index()
    table["split"] = ["dual" if p in dual else "fit" for p in fit.index] + ["test"] * len(test)
    return validate_prompts(table, "prompts", columns), left_out
