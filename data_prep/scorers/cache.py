"""The scores that a run has computed already, in an SQLite file."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError

KEYS_AT_ONCE = 500
"""SQLite takes a limited number of variables in one statement."""


class ScoreCache:
    """Keep raw scores by key: the hash of scorer fingerprint, prompt and response.

    path: the SQLite file; None keeps the scores in memory. A kill loses nothing that `put` returned
    from. Raises OSError where the file cannot be written (a full disk), UserError where it is no
    score cache.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            # Several processes of one launch write at once; they wait for each other.
            self.database = sqlite3.connect(str(path) if path else ":memory:", timeout=60)
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL) "
                "WITHOUT ROWID"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: not a readable score cache ({error}); delete it, its scores are "
                "then computed again"
            ) from error

    def get(self, keys: list[bytes]) -> dict[bytes, float]:
        """Look up these keys; a key without a score is left out."""
        scores: dict[bytes, float] = {}
        with self._named_errors():
            for begin in range(0, len(keys), KEYS_AT_ONCE):
                chunk = keys[begin : begin + KEYS_AT_ONCE]
                query = f"SELECT key, score FROM scores WHERE key IN ({','.join('?' * len(chunk))})"
                scores.update(self.database.execute(query, chunk))
        return scores

    def put(self, scores: dict[bytes, float]) -> None:
        """Keep scores, all or none of them."""
        with self._named_errors(), self.database:
            self.database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", scores.items())
