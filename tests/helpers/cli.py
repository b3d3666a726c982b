"""`cdpo` in a process of its own."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from unittest.mock import patch

from constrained_dpo.cli.main import main

CDPO = [sys.executable, "-c", "from constrained_dpo.cli.main import main; main()"]


def cdpo(*arguments, check=None) -> subprocess.CompletedProcess:
    """The command as `main` runs it, in this process (importing torch anew takes seconds); an
    unexpected exception fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words, handler = ["cdpo", *map(str, arguments)], signal.getsignal(signal.SIGTERM)
    with (
        patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
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
