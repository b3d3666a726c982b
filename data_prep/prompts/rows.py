"""Rows of a file, a folder or a hub dataset, one after another, each with the place it stands at.
Nothing is held but one batch.

A line that cannot be read is a row with a problem, so that all of them can be named at once; a file
that cannot be is a UserError.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError
from data_prep.prompts.folders import files_of_split
from data_prep.prompts.layouts import layout_columns
from data_prep.prompts.settings import DatasetSource
from data_prep.readers.rows import Row, file_kind, text_rows
from data_prep.settings import EMBEDDED, EVERYDAY

BATCH_ROWS = 1024


def source_name(source: str | Path | DatasetSource) -> str:
    """What messages call it."""
    return source.dataset if isinstance(source, DatasetSource) else str(Path(source).expanduser())


def read_rows(source: str | Path | DatasetSource, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a source in its order, with the columns that a layout reads, and `columns`.

    Files: jsonl, ndjson, json, csv, tsv, txt (one prompt a line), each also with .gz, and parquet.
    Raises UserError for what is not there or cannot be read.
    """
    if not isinstance(source, DatasetSource):
        path = Path(source).expanduser()
        if path.is_dir():
            source = DatasetSource(dataset=str(path))
        elif path.is_file():
            return _file_rows(path, columns)
        else:
            raise UserError(f"prompts: {path}: no such file")
    if source.dataset == EMBEDDED:
        from data_prep.quickstart import PROMPTS

        if source.split not in PROMPTS:
            raise UserError(
                f"prompts: quickstart has no split {source.split}; it has {', '.join(PROMPTS)}"
            )
        return (
            Row(f"row {number}", {"prompt": prompt})
            for number, prompt in enumerate(PROMPTS[source.split], 1)
        )
    if source.dataset == EVERYDAY:
        from data_prep.everyday import question_rows

        return question_rows(source.split)
    folder = Path(source.dataset).expanduser()
    if folder.is_dir():
        return _folder_rows(folder, source, columns)
    return _hub_rows(source, columns)


def _hub_rows(source: DatasetSource, columns: Sequence[str]) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.dataset, source.name, split=source.split, revision=source.revision
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"prompts: dataset {source.dataset} cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    return _dataset_rows(loaded, columns)


def _dataset_rows(loaded, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a `datasets.Dataset`, which lies on disk; a batch of it at a time."""
    number = 0
    for batch in (
        loaded.select_columns(layout_columns(loaded.column_names, columns))
        .with_format("arrow")
        .iter(BATCH_ROWS)
    ):
        for content in batch.to_pylist():
            number += 1
            yield Row(f"row {number}", content)


def _folder_rows(folder: Path, source: DatasetSource, columns: Sequence[str]) -> Iterator[Row]:
    for key in ("name", "revision"):
        if getattr(source, key) is not None:
            raise UserError(
                f"prompts: {folder}: is a folder, and {key} is of hub datasets; drop it, or give "
                "the folder of that part"
            )
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _saved_rows(folder, source.split, columns)
    chosen = files_of_split(folder, source.split)
    several = len(chosen) > 1
    return (
        row._replace(where=f"{f.relative_to(folder)} {row.where}") if several else row
        for f in chosen
        for row in _file_rows(f, columns)
    )


def _saved_rows(folder: Path, split: str, columns: Sequence[str]) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(
            f"prompts: {folder}: not a dataset of save_to_disk "
            f"({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(
                f"prompts: {folder}: no split {split} in it; it has {', '.join(loaded)}"
            )
        loaded = loaded[split]
    return _dataset_rows(loaded, columns)


def _file_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    return _parquet_rows(path, columns) if file_kind(path) == ".parquet" else text_rows(path)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(
                BATCH_ROWS, columns=layout_columns(file.schema_arrow.names, columns)
            ):
                for content in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", content)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); write it again"
        ) from error
