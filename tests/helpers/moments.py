"""Something done to this process in the middle of its work."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def when(moment: Callable[[], bool], action: Callable[[], None]) -> Iterator[None]:
    """Does `action` once, in this thread between two of its instructions, when `moment()` has
    become true."""

    def look(*_: object) -> None:
        if moment():
            signal.setitimer(signal.ITIMER_REAL, 0)
            action()

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt() -> None:
    """As Ctrl-C does."""
    raise KeyboardInterrupt
