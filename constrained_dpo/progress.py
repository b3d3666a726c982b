"""Phases as they pass, through `logging`: when one begins, and how long it took."""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Say seconds in the unit a person would use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def timed(phase: str, action: Callable[[], None]) -> float:
    """Do a phase; log `PHASE ...` when it begins and `PHASE: 3.2 s` when it is done. Return its
    seconds."""
    log.info("%s ...", phase)
    start = time.perf_counter()
    action()
    seconds = round(time.perf_counter() - start, 2)
    log.info("%s: %s", phase, duration(seconds))
    return seconds
