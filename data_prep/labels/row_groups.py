"""Writing a file piece by piece, in parquet row group by row group with texts as dictionaries:
tables that are many times more than what they come from are never whole in memory."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError
from data_prep.readers.rows import LINES, file_kind

DICTIONARY_BYTES = 1 << 28
"""Each text stands once per row group up to here, beyond it once per pair."""

LINES_AT_ONCE = 1 << 12
"""Rows that are Python objects at once."""


def arrow_texts(texts: pd.Series) -> pa.Array:
    """Give a column of texts in arrow."""
    array = pa.array(texts, pa.large_string())  # large: all texts may be more than 2 GiB
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def encoded(texts: pa.Array, name: str) -> pa.DictionaryArray:
    """Encode texts as a dictionary, whose entries must differ; response ids do."""
    if name == "response_id":
        return pa.DictionaryArray.from_arrays(
            pa.array(np.arange(len(texts), dtype=np.int32)), texts
        )
    return texts.dictionary_encode()


def taken(entries: pa.DictionaryArray, places: np.ndarray) -> pa.DictionaryArray:
    """Take the entries at some places, shape (len(places),)."""
    return pa.DictionaryArray.from_arrays(
        pa.array(entries.indices.to_numpy()[places]), entries.dictionary
    )


@contextmanager
def pieces(path: Path, name: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Open a file; yields what writes a table behind the others: as parquet, or an object per line
    where `name` ends in .jsonl or .ndjson. Raises UserError for another format's ending."""
    kind = file_kind(name)
    if kind in (".csv", ".tsv", ".json", ".txt") or Path(name).suffix.lower() == ".gz":
        raise UserError(f"{name}: is written as parquet or jsonl; name it .parquet or .jsonl")
    with _json_lines(path) if kind in LINES else row_groups(path) as write:
        yield write


@contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    with open(path, "w", encoding="utf-8") as handle:

        def write(table: pa.Table) -> None:
            for begin in range(0, len(table), LINES_AT_ONCE):
                for row in table.slice(begin, LINES_AT_ONCE).to_pylist():
                    handle.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def row_groups(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Open a parquet file; yields what writes a table as a row group. It compresses in a
    thread of its own while the next one is made."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        writer: pq.ParquetWriter | None = None
        pending: list[Future[None]] = []

        def write(table: pa.Table) -> None:
            nonlocal writer
            if writer is None:
                # Without the Arrow schema readers see plain texts, not dictionaries.
                dictionaries = [n for f in table.schema for n in _dictionary_columns(f)]
                settings = {
                    "compression": "zstd",
                    "use_dictionary": dictionaries,
                    "dictionary_pagesize_limit": DICTIONARY_BYTES,
                }
                writer = stack.enter_context(
                    pq.ParquetWriter(path, table.schema, store_schema=False, **settings)
                )
                # before the writer is closed, also after an error
                stack.callback(wait, pending)
            for last in pending:
                last.result()
            pending[:] = [pool.submit(writer.write_table, table)]

        yield write
        for last in pending:
            last.result()


def _dictionary_columns(field: pa.Field) -> list[str]:
    """The columns of a parquet file that hold a field's texts, where they are dictionaries; in a
    list of messages one for each of their keys."""
    if pa.types.is_list(field.type):
        message = field.type.value_type
        return [f"{field.name}.list.element.{key.name}" for key in message]
    return [field.name] if pa.types.is_dictionary(field.type) else []
