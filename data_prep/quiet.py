"""What libraries say of themselves while a command runs: their errors, and no more.

Their warnings are about defaults that we set and calls that we make, so a user cannot act on them.
The rule is where a record or a warning comes from, not a list of messages: what a user's own files
say (a scorer's, for one) is heard, and so is what we log.
"""

import logging
import os
import sysconfig
import warnings
from pathlib import Path
from typing import TextIO

OURS = ("constrained_dpo", "data_prep")

INSTALLED = frozenset({"site-packages", "dist-packages"})

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = tuple(
    {
        *(str(Path(sysconfig.get_path(name)).resolve()) + os.sep for name in ("stdlib", "purelib")),
        *(f"{_PACKAGE / name}{os.sep}" for name in OURS),
    }
)
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""What libraries read when they are loaded."""

_show_warning = warnings.showwarning


class LibraryLogger(logging.Logger):
    """A logger of which only errors are heard where a library writes the record. heard_from: the
    level from which a library's records are."""

    heard_from = logging.ERROR

    def handle(self, record: logging.LogRecord) -> None:
        if is_heard(record):
            super().handle(record)


def is_heard(record: logging.LogRecord) -> bool:
    """Decide whether a record is ours, a user's, or a library's error."""
    ours = record.name.partition(".")[0] in OURS
    high = record.levelno >= LibraryLogger.heard_from
    return ours or high or not of_library(record.pathname)


def of_library(file: str) -> bool:
    """Whether a source file belongs to an installed library, to Python or to us."""
    if file.startswith("<") or not INSTALLED.isdisjoint(Path(file).parts):
        return True
    return os.path.realpath(file).startswith(_LIBRARIES)


def quiet_libraries() -> None:
    """Let libraries that are loaded from now on say their errors only; their progress bars are
    none."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    LibraryLogger.heard_from = logging.ERROR
    logging.setLoggerClass(LibraryLogger)
    root = logging.getLogger()
    root.removeFilter(is_heard)
    root.addFilter(is_heard)
    warnings.showwarning = _show_heard_warning


def hear_libraries() -> None:
    """Let libraries say everything again (`--verbose`)."""
    LibraryLogger.heard_from = logging.NOTSET


def _show_heard_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if LibraryLogger.heard_from == logging.NOTSET or not of_library(filename):
        _show_warning(message, category, filename, lineno, file, line)
