"""Rows of text files, one reader for each format, each row with the place it stands at.

jsonl and ndjson (an object per line, split at line feeds alone), json (a list, an object, or an
object per line), csv, tsv and txt, each also with .gz; UTF-8, a byte-order mark is skipped. A row
that cannot be read has a problem instead of its content, so that all of them can be named at once;
a file that cannot be is a UserError.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_prep.errors import UserError

LISTED = 3
"""Rows that an error names; the rest are counted."""

LINES = (".jsonl", ".ndjson")
"""Endings of files with an object per line."""

LONGEST_FIELD = 2**31 - 1
"""Characters of a csv field; Python's own limit of 131,072 is shorter than a long prompt."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Row(NamedTuple):
    """where: `line 3`, `row 3`, or with the file's name in a folder; content: None where there is a
    problem instead."""

    where: str
    content: dict[str, Any] | None
    problem: str | None = None


def file_kind(path: Path) -> str:
    """The ending that says what a file holds: `.csv` of `a.csv.gz`; empty where there is none."""
    suffixes = [s.lower() for s in Path(path).suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def text_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a text file by its ending. Raises UserError where it cannot be read."""
    kind = file_kind(path)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, kind[1:])
    if kind == ".json":
        return _json_file_rows(path)
    if kind in LINES:
        return _line_rows(path)
    if kind == ".txt":
        return _plain_rows(path)
    raise UserError(
        f"{path}: unknown ending {kind or '(none)'}; use .parquet, .csv, .tsv, .json, .jsonl, "
        ".ndjson or, for prompts, .txt"
    )


def refuse_problems(place: object, problems: list[str]) -> None:
    """Raises UserError with the first of the problems, each with its row, where there are any."""
    if problems:
        count = len(problems) - LISTED
        more = f" (and {count} more rows)" if count > 0 else ""
        raise UserError(f"{place}: {'; '.join(problems[:LISTED])}{more}; mend or remove them")


@contextmanager
def _opened(path: Path, newline: str | None, what: str) -> Iterator[IO[str]]:
    """A text file, zipped or not, without its byte-order mark; what: says what an error calls it.

    Raises UserError for bytes that are no text and for a damaged file.
    """
    opener: Any = gzip.open if Path(path).suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as handle:
            yield handle
    except UnicodeDecodeError as error:
        with opener(path, "rb") as handle:
            line = next((n for n, text in enumerate(handle, 1) if not _decodes(text)), 1)
        raise UserError(
            f"{path}: {what} (line {line} is not UTF-8: {error.reason}); save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {what} ({error})") from error


def _decodes(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plain_rows(path: Path) -> Iterator[Row]:
    """A prompt per line that is not blank."""
    with _opened(path, None, "cannot be read") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield Row(f"line {number}", {"prompt": line.rstrip("\n")})


def _line_rows(path: Path) -> Iterator[Row]:
    """An object per line that is not blank. Lines end at a line feed alone: other separators, such
    as U+2028, are part of a text."""
    with _opened(path, "\n", "cannot be read") as handle:
        yield from _numbered(handle)


def _numbered(lines: Iterator[str] | IO[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _line_row(f"line {number}", line.strip())


def _line_row(where: str, line: str) -> Row:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        return Row(where, None, f"not valid JSON ({error.msg} at character {error.colno})")
    return _object_row(where, content, bool(_SURROGATE.search(line)))


def _object_row(where: str, content: object, suspect: bool) -> Row:
    """suspect: the text has an escape that may be half a character."""
    if not isinstance(content, dict):
        return Row(where, None, "not a JSON object")
    if suspect:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return Row(where, None, f"{half} is half a character (a lone surrogate)")
    return Row(where, content)


def _json_file_rows(path: Path) -> Iterator[Row]:
    """The objects of a list, a single object, or an object per line."""
    with _opened(path, None, "cannot be read") as handle:
        text = handle.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _line_row("", text.lstrip().split("\n")[0]).content:
            yield from _numbered(iter(text.split("\n")))
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    suspect = bool(_SURROGATE.search(text))
    for number, item in enumerate(content if isinstance(content, list) else [content], 1):
        yield _object_row(f"item {number}", item, suspect)


def _csv_rows(path: Path, kind: str) -> Iterator[Row]:
    """Rows under a header line, each a text per column; a row is named by its last line."""
    csv.field_size_limit(LONGEST_FIELD)
    what = f"not a readable {kind} file"
    with _opened(path, "", what) as handle:
        reader = csv.reader(handle, delimiter="," if kind == "csv" else "\t", strict=True)
        begin = 1
        try:
            header = _header(reader, path, what)
            begin = reader.line_num + 1
            for cells in reader:
                begin = reader.line_num + 1
                if cells:
                    yield _cells_row(f"line {reader.line_num}", header, cells)
        except csv.Error as error:
            raise UserError(
                f"{path}: {what} (line {begin}: {error}); quote every field with a quote in it, "
                "and double the quotes inside"
            ) from error


def _header(reader: Iterator[list[str]], path: Path, what: str) -> list[str]:
    header = next((cells for cells in reader if cells), None)
    if header is None:
        raise UserError(f"{path}: {what} (it is empty)")
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{path}: {what} (two columns are called {name}); rename one")
    return header


def _cells_row(where: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        word = "more" if len(cells) > len(header) else "fewer"
        return Row(where, None, f"{word} cells than the header ({len(cells)} of {len(header)})")
    return Row(where, dict(zip(header, cells, strict=True)))
