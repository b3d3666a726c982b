"""Categories of a prompt: what a column of its source says that it is about. Pure."""

import re
from collections.abc import Iterable, Mapping

import pandas as pd

from data_prep.errors import UserError


def categories_of(row: Mapping[str, object], column: str) -> list[str]:
    """Read a row's categories, sorted: a text is one; a list of texts are several; of a mapping
    from category to true or false (PKU-SafeRLHF's `harm_category`) those that are true; null or an
    empty text is none.

    Raises ValueError where the column is missing or holds something else.
    """
    if column not in row:
        raise ValueError(f"no `{column}` (it has {', '.join(map(str, row))})")
    value = row[column]
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping) and all(isinstance(v, bool) for v in value.values()):
        return sorted(str(name) for name, holds in value.items() if holds)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return sorted(set(value))
    raise ValueError(
        f"`{column}` is {value!r}; a category is a text, several are a list of texts, or a mapping "
        "from category to true or false"
    )


def category_name(category: str) -> str:
    """Give a category as a name of columns and options: letters, digits and underscores."""
    return re.sub(r"\W+", "_", category, flags=re.ASCII).strip("_") or "_"


def category_counts(prompts: pd.DataFrame, column: str) -> pd.DataFrame:
    """Count the prompts of every category, by category and split."""
    spread = prompts[["split", column]].explode(column).dropna(subset=[column])
    counts = spread.groupby([column, "split"]).size().unstack(fill_value=0)
    return counts.reindex(columns=["fit", "dual", "test"], fill_value=0)


def pooled(counts: pd.DataFrame, least: int, where: str) -> dict[str, list[str]]:
    """Choose the categories that stand alone, by their name: those with `least` dual and as many
    test prompts; the smaller ones are pooled as `other`.

    counts: of `category_counts`. Raises UserError where there is none, where two have one name, or
    where even the pooled ones have too few prompts.
    """
    if counts.empty:
        raise UserError(f"{where}: no prompt has a category")
    small = (counts["dual"] < least) | (counts["test"] < least)
    names: dict[str, list[str]] = {}
    for category in counts.index[~small]:
        names.setdefault(category_name(str(category)), []).append(str(category))
    for name, categories in names.items():
        if len(categories) > 1 or (name == OTHER and small.any()):
            raise UserError(
                f"{where}: {' and '.join(categories)} would be called {name}"
                f"{', which pools the small ones' if len(categories) == 1 else ''}; rename one"
            )
    if small.any():
        names[OTHER] = [str(category) for category in counts.index[small]]
        rest = counts[small].sum()
        if rest["dual"] < least or rest["test"] < least:
            raise UserError(
                f"{where}: the categories {_listed(names[OTHER])} have {rest['dual']} dual and "
                f"{rest['test']} test prompts together, and {least} of each are needed; give more "
                "prompts, or lower min_prompts"
            )
    return names


OTHER = "other"
"""The name of the small categories together."""


def _listed(categories: Iterable[str], most: int = 5) -> str:
    names = list(categories)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
