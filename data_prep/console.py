"""What the command-line programs share: exit codes, options, what is shown."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError
from data_prep.quiet import hear_libraries, quiet_libraries


def _parquet_name(path: Path) -> Path:
    """The path; raises UserError where its ending promises another format."""
    if path.suffix.lower() in OTHER_FORMATS:
        raise UserError(f"--output {path}: is written as parquet; name it .parquet")
    return path


OTHER_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".gz")

Output = Annotated[
    Path, typer.Option("--output", "-o", help="parquet file to write", callback=_parquet_name)
]


AsJson = Annotated[bool, typer.Option("--json", help="machine-readable summary")]


def run_app(application: Callable[[], None], may_speak: Callable[[], bool] = lambda: True) -> None:
    """Runs a CLI: a user's mistake is one line on stderr and exit code 2, never a traceback; Ctrl-C
    is 130, SIGTERM 143, a failure 1.

    may_speak: asked before an error is printed; of several processes that end together one says
    why.
    """
    import os
    import signal

    # Before torch is loaded: its threads wait by spinning, which on a machine shared with other
    # work makes everything ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    quiet_libraries()
    log_to_stderr()
    stopped_by: list[int] = [signal.SIGINT]

    def terminate(number: int, frame: object) -> None:
        stopped_by.append(number)
        raise KeyboardInterrupt  # unwinds like Ctrl-C, so that temporary files go

    signal.signal(signal.SIGTERM, terminate)
    try:
        application()
    except UserError as error:
        for line in str(error).splitlines() if may_speak() else ():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if (
            isinstance(stop, SystemExit) and stop.code != 130
        ):  # typer turns an interrupt into exit 130, without a word
            raise
        if may_speak():
            print("stopped; the same command resumes where it stopped", file=sys.stderr)
        sys.exit(128 + stopped_by[-1])
    except FloatingPointError as error:
        if may_speak():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if may_speak():
            print(
                f"error: {error}; the run directory is left resumable: mend the cause and give "
                "the same command again",
                file=sys.stderr,
            )
        sys.exit(1)


class StderrHandler(logging.Handler):
    """Writes our own log lines to stderr, above progress bars. On a terminal a line that ends in
    `...` is replaced by the next one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line, live = record.getMessage(), sys.stderr.isatty()
        erase = "\r\x1b[K" if live else ""
        end = "" if live and line.endswith("...") else "\n"
        tqdm.write(f"{erase}{line}", file=sys.stderr, end=end)
        sys.stderr.flush()


def log_to_stderr() -> None:
    """Show what the library logs."""
    for name in ("constrained_dpo", "data_prep"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
            logger.addHandler(StderrHandler())
        logger.setLevel(logging.INFO)


def common_options(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="show the libraries' own warnings too")
    ] = False,
) -> None:
    """Read the options in front of a command's name."""
    if verbose:
        hear_libraries()


def parse_assignments(pairs: list[str], option: str) -> dict[str, float]:
    """NAME=NUMBER options as a dict; raises UserError."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            if not equals or not name or name in values:
                raise ValueError
            values[name] = float(value)
        except ValueError as error:
            raise UserError(f"{option} {pair}: write NAME=NUMBER, each name once") from error
    return values
