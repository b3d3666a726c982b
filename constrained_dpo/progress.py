"""Phases as they pass: when one begins and how long it took."""

import sys
import time
from collections.abc import Callable


def print_phase(phase: str, seconds: float | None) -> None:
    """A line per phase on stderr (an `Announce`): when it begins, and its seconds when done; on a
    terminal in place of the first."""
    live = sys.stderr.isatty()
    if seconds is None:
        print(f"{phase} ...", end="\r" if live else "\n", file=sys.stderr, flush=True)
    else:
        erase = "\r\x1b[K" if live else ""
        print(f"{erase}{phase}: {duration(seconds)}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


Announce = Callable[[str, float | None], None]
"""Told a phase's name with None when it begins, and with its seconds when it is done."""


def silent(phase: str, seconds: float | None) -> None:
    """The `Announce` that says nothing."""


def timed(announce: Announce, phase: str, action: Callable[[], None]) -> float:
    """Runs a phase and announces it; returns its seconds."""
    announce(phase, None)
    start = time.perf_counter()
    action()
    seconds = round(time.perf_counter() - start, 2)
    announce(phase, seconds)
    return seconds
