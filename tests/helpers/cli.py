"""`cdpo` in a process of its own."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TextIO
from unittest.mock import patch

from constrained_dpo.cli.main import main

CDPO = [sys.executable, "-c", "from constrained_dpo.cli.main import main; main()"]


def called(command: Callable[[], None], words: list[str], stdout: TextIO, stderr: TextIO) -> int:
    """Runs a command's `main` in this process; returns its exit code."""
    handler = signal.getsignal(signal.SIGTERM)
    with (
        patch.object(sys, "argv", words),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            command()
        except SystemExit as stop:
            return stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return 0


def cdpo(*arguments, check=None) -> subprocess.CompletedProcess:
    """The command as `main` runs it, in this process (importing torch anew takes seconds); an
    unexpected exception fails the test."""
    out, err, words = io.StringIO(), io.StringIO(), ["cdpo", *map(str, arguments)]
    code = called(main, words, out, err)
    result = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    if check is not None:
        assert result.returncode == check, result.stderr + result.stdout
    return result


def kill_when(words: list[str], moment) -> bool:
    """Starts `cdpo WORDS`, kills its whole process group as soon as `moment()` is true; False if it
    ended before."""
    process = subprocess.Popen(
        [*CDPO, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ,
    )
    while process.poll() is None:
        if moment():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False
