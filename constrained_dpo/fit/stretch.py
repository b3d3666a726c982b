"""A stretch of a fit: which part of its schedule, from where, to where. Neither torch nor PEFT."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stretch:
    """One of `count` equal parts of a fit's schedule, by `number` from 0.

    begin: the checkpoint at the end of the one before, None for the first; keep: where the
    checkpoint at its end goes, None for the last.
    """

    number: int = 0
    count: int = 1
    begin: Path | None = None
    keep: Path | None = None
