"""Starts the tests' servers as processes on free ports, and kills them."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    """A port that nobody holds, below those that systems give to outgoing connections: nobody takes
    it while a killed server is away.

    Not from `random`'s generator: every fit seeds that, and two workers of the tests would draw the
    same ports.
    """
    draws = random.SystemRandom()
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", draws.randrange(15_000, 32_000)))
            except OSError:
                continue
            return probe.getsockname()[1]


class ServerProcess:
    """A server that can be killed, with the processes it started, and started again on its port.

    patience: seconds until it must answer.
    """

    def __init__(
        self, command: list[str], port: int, ready_path: str, log: Path, patience: float = 60.0
    ) -> None:
        self.command, self.port, self.ready_path, self.log = command, port, ready_path, log
        self.patience = patience
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self, wait: bool = True) -> None:
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, start_new_session=True
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(self.url + self.ready_path, timeout=5)
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the server does not answer: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start_fault_server(
    folder: Path, plan: list[str] = (), upstream: str | None = None
) -> ServerProcess:
    """`fault_server.py`; its log of answered requests is folder/answered.jsonl."""
    port = free_port()
    command = [
        sys.executable,
        str(HERE / "fault_server.py"),
        str(port),
        str(folder / "answered.jsonl"),
        json.dumps(list(plan)),
    ]
    return ServerProcess(
        [*command, *([upstream] if upstream else [])], port, "/version", folder / "server.log"
    )


def start_transformers_serve(model: Path, folder: Path) -> ServerProcess:
    """`transformers serve` pinned to a model folder."""
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    return ServerProcess(
        [sys.executable, "-c", code, "serve", str(model), *options],
        port,
        "/health",
        folder / "serve.log",
        patience=300.0,
    )


def answered_texts(folder: Path) -> list[tuple[str, str]]:
    """Every text whose score a scoring fault server sent, as often as it did."""
    log = folder / "answered.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(text) for line in lines for text in json.loads(line)]
