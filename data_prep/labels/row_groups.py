"""Writing a parquet file row group by row group, texts as dictionaries: tables that are many times
more than what they come from are never whole in memory."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

DICTIONARY_BYTES = 1 << 28
"""Each text stands once per row group up to here, beyond it once per pair."""


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
                dictionaries = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
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
