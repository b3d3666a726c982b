"""Real runs that are killed: processes forked from a server that has the libraries, and what a
killed run has left behind."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from constrained_dpo.run.directory import RunDirectory


def serve() -> None:
    """Imports what `cdpo run` needs, then forks a process (in a process group of its own) per line
    "LOGFILE\\tARGUMENTS..." on stdin."""
    import constrained_dpo.learners.lora  # noqa: F401
    from constrained_dpo.cli.main import main

    print("ready", flush=True)
    for line in sys.stdin:
        log, *arguments = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # a shell's background jobs ignore it, and so would this one
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["cdpo", *arguments]
            main()
            os._exit(0)
        os.setpgid(pid, pid)  # here too: the caller may kill the group before the child has run
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Server:
    """The server's side of the script: one process under test at a time."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "server.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout.readline().strip() == "ready"

    def start(self, *arguments: object) -> int:
        self.process.stdin.write("\t".join(map(str, (self.log, *arguments))) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Exit status of the process under test, −N after signal N."""
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def alive(pid: int) -> bool:
    """False for a process that is gone or is waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def half_written(run: RunDirectory) -> list[Path]:
    """Temporary files of atomic writes, and weights that are being saved inside an adapter's
    temporary folder."""
    return [p for p in run.path.rglob(".*.tmp") if p.is_file()] + list(
        run.path.glob("rounds/*/.adapter.tmp/*.safetensors")
    )


def phase(run: RunDirectory) -> tuple[int, str]:
    """(round, what the run is in the middle of), from its files alone; round −1 is `prepare`."""
    number = max(len(json.loads(run.state_file.read_text())["lambda"]) - 1, -1)
    if number < 0:
        steps = {"prepare: pool": run.pool_file(None), "prepare: reference": run.reference_file}
        if run.recipe().policy.model == "quickstart":
            steps["prepare: optimum"] = run.exact_file
    else:
        steps = {
            "relabel": run.pairs_file(number),
            "fit": run.adapter_folder(number),
            "rescore": run.samples_file(number),
        }
        steps |= {"grow pool": run.pool_file(number), "estimates": run.round_file(number)}
    left = [name for name, file in steps.items() if not file.exists()]
    return number, left[0] if left else "commit"


def broken_files(run: RunDirectory) -> list[str]:
    """Visible files that cannot be read whole."""
    broken = []
    for file in run.path.rglob("*"):
        if not file.is_file() or any(
            name.startswith(".") for name in file.relative_to(run.path).parts
        ):
            continue
        try:
            if file.suffix == ".parquet":
                pd.read_parquet(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(file, "np") as weights:
                    [weights.get_tensor(key) for key in weights.keys()]
            elif file.suffix == ".sqlite":
                broken += broken_database(file)
        except Exception as error:
            broken.append(f"{file}: {error}")
    return broken


def broken_database(file: Path) -> list[str]:
    """Checks a copy, journal included, so that recovery itself is left to the run."""
    with tempfile.TemporaryDirectory() as folder:
        for piece in file.parent.glob(f"{file.name}*"):
            shutil.copy(piece, folder)
        with sqlite3.connect(Path(folder) / file.name) as database:
            verdict = database.execute("PRAGMA integrity_check").fetchone()[0]
    return [] if verdict == "ok" else [f"{file}: {verdict}"]


def lock_is_free(run: RunDirectory) -> bool:
    try:
        with open(run.path / ".lock", "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def content(run: RunDirectory) -> dict[str, str]:
    """Every result of a run by name, to the last bit: tables, λ history, records (less their
    seconds), adapters."""
    results = {"λ history": repr(run.state().lambda_)}
    for file in sorted(run.path.rglob("*.parquet")):
        results[str(file.relative_to(run.path))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(run.path.glob("rounds/*/round.json")):
        record = json.loads(file.read_text())
        results[str(file.relative_to(run.path))] = repr(
            {k: v for k, v in record.items() if k != "seconds"}
        )
    for file in [
        *run.path.glob("exact.json"),
        *sorted(run.path.glob("rounds/*/adapter/*.safetensors")),
        *sorted(run.path.glob("rounds/*/family*/*.safetensors")),
    ]:
        results[str(file.relative_to(run.path))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return results


def leftovers(run: RunDirectory) -> list[str]:
    return [
        str(p)
        for pattern in (
            *(".*.tmp", ".checkpoints", ".refresh", ".adapter-*"),
            *("shards/*/*", "*-refresh-*", "*-journal"),
        )
        for p in run.path.rglob(pattern)
    ]


def differences(run: RunDirectory, expected: dict[str, str]) -> list[str]:
    """Names of results that are missing, too many or not the reference run's."""
    results = content(run)
    return [
        f"{run.path}: {name} differs"
        for name in sorted(results.keys() | expected.keys())
        if results.get(name) != expected.get(name)
    ]


if __name__ == "__main__":
    serve()
