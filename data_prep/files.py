"""Files and folders that appear whole or not at all, their hashes and locks."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout, UnixFileLock

from data_prep.errors import UserError


def cache_folder() -> Path:
    """Where the trained policy is kept: $XDG_CACHE_HOME (or ~/.cache)/constrained-dpo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "constrained-dpo"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends: a reader sees the
    old file or the whole new one, also after a power cut. After an error nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, error.strerror or str(error), str(path)
        ) from error  # a full disk's own error names no file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    write_atomically(
        path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def hash_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds an existing folder for this process by the OS's lock, and sweeps half-written files
    that a killed one left in it.

    Raises UserError when another process holds it or it cannot be written.
    """
    lock, holder = UnixFileLock(folder / ".lock", blocking=False), folder / ".holder"
    try:
        lock.acquire()
    except Timeout as error:
        with suppress(OSError):
            raise UserError(
                f"{folder}: is being worked on by {holder.read_text()}; wait for it or stop it"
            ) from error
        raise UserError(
            f"{folder}: is being worked on by another process; wait for it or stop it"
        ) from error
    except OSError as error:
        raise unwritable(folder, error) from error
    with lock:
        for leftover in list(folder.rglob(".*.tmp")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        # Only a courtesy to whom the lock turns away: a full disk is reported by the first write.
        with suppress(OSError):
            holder.write_text(f"process {os.getpid()}")
        yield


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this program wrote; raises UserError where it is gone, damaged or
    something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); restore it from a backup"
        ) from error
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from a backup") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; restore it from a backup")
    return content


def unwritable(path: Path, error: OSError) -> Exception:
    """A folder that cannot be written is the user's choice (exit 2), a disk that is full is not
    (exit 1)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    return UserError(
        f"{path}: cannot be written ({error.strerror}); choose a writable run directory"
    )
