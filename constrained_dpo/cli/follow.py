"""`cdpo status --follow`: where a run stands while another process plays it, from its files."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.status import Activity

POLL = 1.0
"""Seconds between two looks at the files."""

GRACE = 60.0
"""Seconds that a process may take to begin after it is looked for."""

SAID_EVERY = 60.0
"""Seconds between two lines of one phase, where no terminal is painted."""


def follow_run(console: "Console", run: "RunDirectory") -> None:
    """Show a run until no process works on it any more, or Ctrl-C: painted anew on a terminal, a
    line now and then elsewhere."""
    run.recipe()  # a folder that is no run is refused before anything is waited for
    try:
        if console.is_terminal:
            _paint(console, run)
        else:
            _say(console, run)
    except KeyboardInterrupt:
        return


def _moments(run: "RunDirectory") -> "Iterator[Activity | None]":
    """What is under way, every second, until nothing is."""
    from constrained_dpo.run.status import read_activity

    begun, seen = time.monotonic(), False
    while True:
        activity = read_activity(run)
        seen = seen or activity is not None
        yield activity
        if activity is None and (seen or _all_played(run) or time.monotonic() - begun > GRACE):
            return
        time.sleep(POLL)


def _all_played(run: "RunDirectory") -> bool:
    return run.rounds_done() >= run.recipe().dual.rounds


def _paint(console: "Console", run: "RunDirectory") -> None:
    """Paint the status over itself."""
    from rich.live import Live
    from rich.text import Text

    from constrained_dpo.report.status_words import activity_line, print_status
    from constrained_dpo.run.status import read_status

    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for activity in _moments(run):
            with console.capture() as painted:
                print_status(console, read_status(run))
                console.print(activity_line(activity), end="")
            live.update(Text.from_ansi(painted.get()), refresh=True)


def _say(console: "Console", run: "RunDirectory") -> None:
    """Print a line where a phase begins and every minute, and the status at the end."""
    from constrained_dpo.report.status_words import activity_line, print_status
    from constrained_dpo.run.status import read_status

    phase, said = "", 0.0
    for activity in _moments(run):
        now = time.monotonic()
        name = "" if activity is None else activity.phase or activity.label or ""
        if activity is not None and name and (name != phase or now - said > SAID_EVERY):
            print(activity_line(activity), flush=True)
            phase, said = name, now
    print_status(console, read_status(run))
