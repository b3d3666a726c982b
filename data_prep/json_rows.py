"""Rows of JSON files, with the lines that are broken."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from data_prep.errors import UserError


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl file, or of a .json file that holds a list; raises UserError with
    the broken lines' numbers."""
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            text = handle.read()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if ".json" in path.suffixes:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
        rows = rows if isinstance(rows, list) else [rows]
        broken = [i + 1 for i, row in enumerate(rows) if not isinstance(row, dict)]
        what = "item"
    else:
        rows, broken, what = [], [], "line"
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken.append(number)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(
            f"{path}: not a JSON object in {what} {', '.join(map(str, broken[:5]))}{more}; mend "
            "or remove them"
        )
    return rows
