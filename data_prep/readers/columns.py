"""The types of a table's columns: ids and texts are texts in every format, scores are numbers."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from data_prep.readers.rows import Row

IDS = frozenset({"prompt_id", "response_id", "group_id", "chosen_id", "rejected_id"})

TEXTS = frozenset(
    {"prompt", "response", "chosen", "rejected", "messages"}
    | {"response_0", "response_1", "source", "split"}
)
"""Columns whose cells are texts whatever they look like; other columns are what they hold."""

# No zero in front of another digit: such a cell is a code, not a number.
_NUMBER = re.compile(r"\s*[+-]?(((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?|inf|nan)\s*", re.I)

_INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*")

_TRUTH = {"True": True, "true": True, "False": False, "false": False}


def csv_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """A table of csv rows: ids and TEXTS as they are written (an empty id is missing), another
    column as numbers or truth values where all its cells are; only an empty cell of numbers is
    missing."""
    header = list(rows[0].content or {}) if rows else []
    columns = {name: [(row.content or {})[name] for row in rows] for name in header}
    return pd.DataFrame({name: _cells(name, cells) for name, cells in columns.items()})


def _cells(name: str, cells: list[str]) -> object:
    if name in IDS:
        return pd.Series([cell or None for cell in cells], dtype="str")
    if name in TEXTS:
        return pd.Series(cells, dtype="str")
    filled = [cell for cell in cells if cell]
    if all(cell in _TRUTH for cell in cells):
        return [_TRUTH[cell] for cell in cells]
    if all(map(_NUMBER.fullmatch, filled)) and any(c.isdigit() for cell in filled for c in cell):
        if len(filled) == len(cells) and all(map(_INTEGER.fullmatch, cells)):
            return np.array([int(cell) for cell in cells], np.int64)
        return np.array([float(cell or "nan") for cell in cells])
    return pd.Series(cells, dtype="str") if filled else np.full(len(cells), np.nan)


def json_frame(rows: Iterable[Row]) -> tuple[pd.DataFrame, list[str]]:
    """A table of objects, its ids not yet texts, and where its rows stand."""
    rows = list(rows)
    frame = pd.DataFrame([row.content for row in rows])
    for name in IDS & {*map(str, frame.columns)}:
        # as they are written: a column of numbers and a hole would be one of floats
        frame[name] = pd.Series([(row.content or {}).get(name) for row in rows], dtype=object)
    return frame, [row.where for row in rows]


def id_texts(column: pd.Series) -> tuple[pd.Series, list[int]]:
    """The ids as texts, a whole number without its decimals and a missing one missing; and the
    positions of what is neither text nor number, shape (num_bad,)."""
    if column.dtype == "str":
        return column, []
    if column.dtype.kind in "iu" and not column.hasnans:
        return column.astype("str"), []
    values = column.astype(object).tolist()
    bad = [i for i, value in enumerate(values) if _is_no_id(value)]
    texts = [None if _is_no_id(value) else _id_text(value) for value in values]
    return pd.Series(texts, index=column.index, dtype="str"), bad


def _is_no_id(value: object) -> bool:
    return isinstance(value, bool | np.bool_ | dict | list | np.ndarray)


def _id_text(value: Any) -> str | None:
    if not isinstance(value, str) and pd.isna(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def text_problems(column: pd.Series) -> list[tuple[int, str]]:
    """Positions of values that are no text, each with what it is instead."""
    return [
        (i, f"{column.name} is {'null' if missing else repr(value)[:40]}, not a text")
        for i, value in enumerate(column.astype(object))
        if not isinstance(value, str)
        for missing in [value is None or (isinstance(value, float) and value != value)]
    ]
