"""Tables in files: parquet, csv, tsv, json and jsonl, read and written whole."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.readers.columns import IDS, csv_frame, id_texts, json_frame, text_problems
from data_prep.readers.rows import file_kind, refuse_problems, text_rows
from data_prep.tables import ARROW, GROUPS, PAIRS, PROMPTS, RESPONSES


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table atomically (parquet, zstd). Token ids are int32 lists; log-probabilities
    float64, null where unknown."""
    schema = {**PROMPTS, **RESPONSES, **PAIRS, **GROUPS}
    fields = []
    for column in frame.columns:
        kind = schema.get(column)
        if kind in ARROW:
            fields.append(pa.field(column, ARROW[kind]))
        elif kind is not None:
            fields.append(pa.field(column, pa.float64()))
        else:
            fields.append(pa.field(column, pa.Array.from_pandas(frame[column]).type))
    table = pa.Table.from_pandas(frame, schema=pa.schema(fields), preserve_index=False)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(Path(path), sink.getvalue().to_pybytes())


def read_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Reads a parquet table, ids as texts; raises UserError naming the file when it is missing,
    truncated or lacks a column."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        frame: pd.DataFrame = pq.read_table(path, columns=columns).to_pandas()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a readable parquet file ({first_line}); write it again"
        ) from error
    return _with_text_ids(frame, path, None)


def read_columns(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a table, of a parquet file those of the columns that it has alone.

    Raises UserError where the file is missing or broken.
    """
    if file_kind(path) != ".parquet" or not path.is_file():
        return read_table(path)
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError):
        present = columns  # reading it says what is wrong
    return read_parquet(path, [name for name in dict.fromkeys(columns) if name in present])


def read_table(path: Path, texts: Iterable[str] = ()) -> pd.DataFrame:
    """Reads a parquet, csv, tsv, json, jsonl or ndjson table by its ending (`.gz` allowed).

    Ids are texts in every format, and so are the columns of `columns.TEXTS` in csv and tsv; texts:
    columns that must be texts in every row. Raises UserError naming file and rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind, places = file_kind(path), None
    if kind == ".parquet":
        frame = read_parquet(path)
    else:
        if kind == ".txt":
            raise UserError(f"{path}: unknown ending .txt; a table is .parquet, .csv or .jsonl")
        rows = list(text_rows(path))
        refuse_problems(path, [f"{row.where}: {row.problem}" for row in rows if row.problem])
        if kind in (".csv", ".tsv"):
            frame, places = csv_frame(rows), [row.where for row in rows]
        else:
            frame, places = json_frame(rows)
        frame = _with_text_ids(frame, path, places)
    problems = [
        f"{_place(i, places)}: {problem}"
        for name in texts
        if name in frame
        for i, problem in text_problems(frame[name])
    ]
    refuse_problems(path, problems)
    return frame


def _place(position: int, places: list[str] | None) -> str:
    return places[position] if places else f"row {position + 1}"


def _with_text_ids(frame: pd.DataFrame, path: Path, places: list[str] | None) -> pd.DataFrame:
    """The table with its ids as texts; raises UserError for what is no id."""
    for name in [str(column) for column in frame.columns if column in IDS]:
        column, bad = id_texts(frame[name])
        what = [f"{_place(i, places)}: {name} is {frame[name].iloc[i]!r}, not an id" for i in bad]
        refuse_problems(path, what)
        if column is not frame[name]:
            frame[name] = column
    return frame
