"""Commands on a terminal of 40 × 140 characters: a pseudo-terminal, read as it fills."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from unittest.mock import patch

from constrained_dpo.cli.main import main
from tests.helpers.cli import CDPO, called

LINES, COLUMNS = 40, 140


def terminal_environment(**changes: str) -> dict[str, str]:
    """The environment of a colour terminal."""
    unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    return plain | {"TERM": "xterm-256color"} | changes


def open_terminal() -> tuple[int, int]:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    return leader, follower


def read_all(leader: int) -> str:
    """What is written until the other end is closed."""
    pieces = []
    while True:
        try:
            pieces.append(os.read(leader, 65536))
        except OSError:
            break
        if not pieces[-1]:
            break
    os.close(leader)
    return b"".join(pieces).decode()


def on_terminal(*arguments: object, **environment: str) -> str:
    """Everything that `cdpo` in this process writes to a terminal."""
    leader, follower = open_terminal()
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(read_all(leader)))
    reader.start()
    # rich asks the process's own streams for the width, which are no terminal here.
    changes = terminal_environment(COLUMNS=str(COLUMNS), **environment)
    with open(follower, "w") as tty, patch.dict(os.environ, changes, clear=True):
        code = called(main, ["cdpo", *map(str, arguments)], tty, tty)
    reader.join()
    assert code == 0, seen[0]
    return seen[0]


def process_on_terminal(*arguments: object) -> str:
    """Everything that `cdpo` in a process of its own writes to a terminal."""
    leader, follower = open_terminal()
    words, environment = [*CDPO, *map(str, arguments)], terminal_environment()
    process = subprocess.Popen(
        words, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    seen = read_all(leader)
    assert process.wait() == 0, seen
    return seen
