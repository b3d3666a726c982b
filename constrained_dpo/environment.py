"""The environment, read once when a command starts: what libraries would take from it in place of
the recipe is cleared or refused, and waiting for other processes obeys SIGTERM.

accelerate reads `ACCELERATE_*` and launchers' variables wherever they come from: a mixed precision
left by another program makes another adapter, and a leftover WORLD_SIZE waits for processes that
nobody started.
"""

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from data_prep.errors import UserError

log = logging.getLogger(__name__)

KEPT = frozenset({"ACCELERATE_USE_CPU"})
"""Says on which device a command computes, which policy.device: auto leaves open."""

READ_BY_ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")

LAUNCHERS = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")
RANKS = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"})

DECIDED = {
    "ACCELERATE_MIXED_PRECISION": ("no", "policy.dtype decides; launch with --mixed_precision no"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "a fit is not compiled; launch with --dynamo_backend no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "fit.gradient_accumulation decides"),
}
"""What a launch must leave to the recipe: the value that changes nothing, and what to do."""

NOTICE_AFTER = 5.0
"""Seconds of waiting until it is said for what."""


def settle_environment() -> None:
    """Read the launch's variables; raises UserError where they contradict each other or the recipe.

    Without a launch they are cleared, with a notice where one would have changed the numbers.
    """
    size = _number("WORLD_SIZE") if "LOCAL_RANK" in os.environ else 1
    if size > 1:
        _check_launched(size)
        return
    prefixes = (*READ_BY_ACCELERATE, *LAUNCHERS)
    found = [n for n in os.environ if (n.startswith(prefixes) or n in RANKS) and n not in KEPT]
    for name in sorted(found):
        value = os.environ.pop(name)
        if name in DECIDED and value.lower() not in ("", DECIDED[name][0]):
            log.info("%s=%s in the environment is left aside: the recipe decides", name, value)


def _check_launched(size: int) -> None:
    here = _number("RANK")
    if not 0 <= here < size:
        raise UserError(
            f"RANK={here}, WORLD_SIZE={size} in the environment: no such process; unset both, or "
            "start the command with `accelerate launch`"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"WORLD_SIZE={size} is in the environment, but {name} is not; unset WORLD_SIZE and "
                "LOCAL_RANK, or start the command with `accelerate launch`"
            )
    _number("MASTER_PORT")
    require_undecided()


def require_undecided() -> None:
    """Raises UserError where the environment decides what the recipe decides; also for programs
    that fit without the command line."""
    for name, (harmless, advice) in DECIDED.items():
        value = os.environ.get(name, harmless).lower()
        if value not in ("", harmless, "auto"):
            raise UserError(f"{name}={value} in the environment: {advice}; unset it")


def _number(name: str) -> int:
    """A launcher's number. Raises UserError where it is absent or none."""
    value = os.environ.get(name, "1" if name == "WORLD_SIZE" else "")
    try:
        return int(value)
    except ValueError as error:
        raise UserError(
            f"{name}={value!r} in the environment is not a number; unset the launcher's variables "
            "(WORLD_SIZE, LOCAL_RANK), or start the command with `accelerate launch`"
        ) from error


def launch_words() -> str:
    """What a process of a launch waits for when it joins the others."""
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    told = " ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    return (
        f"waiting for the other processes of the launch ({told}); if there is none, stop this and "
        "unset WORLD_SIZE and LOCAL_RANK"
    )


@contextmanager
def waiting(words: str | None = None) -> Iterator[None]:
    """While the block waits in a library for other processes, SIGTERM and SIGINT end this one at
    once, and after NOTICE_AFTER seconds `words` are said.

    Python's own handlers run only when the library returns, which may be never; their arrival is
    written to a pipe at once, which a thread reads. Nothing is held that had to be undone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    done = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, done, words), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, done: threading.Event, words: str | None) -> None:
    timeout: float | None = NOTICE_AFTER if words else None
    while not done.is_set():
        if not select.select([reader], [], [], timeout)[0]:
            print(words, file=sys.__stderr__, flush=True)
            timeout = None
            continue
        for number in os.read(reader, 64):
            if number in (signal.SIGTERM, signal.SIGINT) and not done.is_set():
                os._exit(128 + number)
