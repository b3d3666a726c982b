"""Phases as they pass: through `logging` when one begins and how long it took, on stderr as a bar
with the time that is left, and on disk for `cdpo status --follow`.

What is under way stands in a file beside a run while a process works on it. It is a courtesy: a
disk that is full must not stop a run.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

LATE = 0.2
"""Share of the time of what is not done yet that is claimed at least, however late it is."""

WRITTEN_EVERY = 0.5
"""Seconds between two writes of a bar's state."""


def duration(seconds: float) -> str:
    """Say seconds in the unit a person would use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Reporter:
    """Writes what this process does into a file, and keeps the pace of what it did before.

    paces: seconds per unit by kind of work.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.paces = file, dict[str, float]()
        self.content: dict[str, Any] = {"process": os.getpid(), "host": socket.gethostname()}
        self.written = 0.0

    def pace(self, kind: str, like: tuple[str, float] | None) -> float | None:
        """Seconds per unit of a kind of work, as it was done before, or as one like it was."""
        if kind in self.paces or like is None or like[0] not in self.paces:
            return self.paces.get(kind)
        return self.paces[like[0]] * like[1]

    def phase(self, name: str | None) -> None:
        """A phase begins, or the last one ended (None)."""
        self.content |= {"phase": name, "began": time.time(), "bar": None}
        self._write()

    def bar(self, content: dict[str, Any] | None, hurried: bool) -> None:
        """A bar moved, or ended (None); hurried: only where the last write was a while ago."""
        self.content["bar"] = content
        if not hurried or time.monotonic() - self.written > WRITTEN_EVERY:
            self._write()

    def _write(self) -> None:
        self.written = time.monotonic()
        temporary = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.content))
            temporary.replace(self.file)


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(file: Path) -> Iterator[None]:
    """Phases and bars within the block are told to the file, which goes with it."""
    token = _reporter.set(Reporter(file))
    try:
        yield
    finally:
        _reporter.reset(token)
        with suppress(OSError):
            file.unlink(missing_ok=True)


def timed(phase: str, action: Callable[[], None]) -> float:
    """Do a phase; log `PHASE ...` when it begins and `PHASE: 3.2 s` when it is done. Return its
    seconds."""
    log.info("%s ...", phase)
    start, reporter = time.perf_counter(), _reporter.get()
    if reporter is not None:
        reporter.phase(phase)
    action()
    seconds = round(time.perf_counter() - start, 2)
    log.info("%s: %s", phase, duration(seconds))
    if reporter is not None:
        reporter.phase(None)
    return seconds


class Pace:
    """How fast units of work are done, and the seconds that the rest will take.

    The mean over the units since the first, which pays for what later ones do not; before there
    are any the pace of the same kind of work earlier (`before`, seconds per unit), or none.
    """

    def __init__(self, total: int, done: int, before: float | None) -> None:
        self.total, self.done, self.before = total, done, before
        self.moments = [(time.monotonic(), done)]

    def step(self, units: int) -> None:
        """So many units are done."""
        self.done += units
        self.moments = [*self.moments[:2], (time.monotonic(), self.done)]

    @property
    def seconds_per_unit(self) -> float | None:
        """Seconds of a unit; None where nothing is known."""
        if len(self.moments) == 1:
            return self.before
        first, last = self.moments[1 if len(self.moments) > 2 else 0], self.moments[-1]
        return (last[0] - first[0]) / (last[1] - first[1]) if last[1] > first[1] else self.before

    @property
    def seconds_left(self) -> float | None:
        """Seconds from now until all units are done; None where nothing is known."""
        pace = self.seconds_per_unit
        if pace is None:
            return None
        left, since = pace * (self.total - self.done), time.monotonic() - self.moments[-1][0]
        return max(LATE * left, left - since)


class Bar:
    """A bar on stderr, quiet where that is no terminal, whose state is also on disk while a
    run is worked on.

    kind: of work; a later bar of the same kind knows its pace from the start. like: another kind,
    and how many times as long as its units these take, for the first bar of a kind. done: units
    that an earlier process did, which say nothing of the pace.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int,
        unit: str,
        kind: str,
        like: tuple[str, float] | None = None,
        done: int = 0,
    ) -> None:
        self.label, self.unit, self.kind, self.reporter = label, unit, kind, _reporter.get()
        before = None if self.reporter is None else self.reporter.pace(kind, like)
        self.pace = Pace(total, done, before)
        self.shown = _shown(self)
        self._tell(hurried=False)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, units: int = 1) -> None:
        """So many units are done."""
        self.pace.step(units)
        self.shown.update(units)
        self._tell(hurried=True)

    def note(self, words: str) -> None:
        """Words behind the bar."""
        self.shown.set_postfix_str(words)

    def close(self) -> None:
        """Take the bar away, and keep its pace."""
        self.shown.close()
        pace = self.pace.seconds_per_unit
        if self.reporter is not None:
            self.reporter.bar(None, hurried=False)
            if pace is not None:
                self.reporter.paces[self.kind] = pace

    def _tell(self, *, hurried: bool) -> None:
        if self.reporter is not None:
            content = {
                "label": self.label,
                "unit": self.unit,
                "done": self.pace.done,
                "total": self.pace.total,
                "seconds_left": self.pace.seconds_left,
                "at": time.time(),
            }
            self.reporter.bar(content, hurried)


def _shown(bar: Bar) -> Any:
    """The bar on stderr, with our pace in place of its own."""
    from tqdm import tqdm

    class Paced(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            pace = bar.pace.seconds_per_unit
            return {**super().format_dict, "rate": 1 / pace if pace else None}

    return Paced(
        desc=bar.label,
        total=bar.pace.total,
        initial=bar.pace.done,
        unit=bar.unit,
        disable=None,
        leave=False,
    )
