"""A real HTTP server that scores, or stands before another server, and fails by plan: `python
fault_server.py PORT LOG [PLAN] [UPSTREAM]`.

LOG gets a line (JSON) per request that was answered well, after its answer was sent, with the texts
that were scored or the path that was asked. PLAN: JSON list with what happens to each request in
turn (ok afterwards), shared by restarts through LOG.requests, which has a byte per request.
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAUSE = 0.03  # seconds of work per request, so that there is a midway
KEY = "the-right-key"


def score(prompt: str, response: str) -> float:
    return len(response) - 0.5 * len(prompt)


class Server(BaseHTTPRequestHandler):
    lock = threading.Lock()
    log: Path
    plan: list[str]
    upstream: str | None

    def do_GET(self) -> None:
        self.answer(*self.forward(None)) if self.upstream else self.answer(
            200, {"model": "counter", "weights": "v1"}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with (
            self.lock,
            self.log.with_suffix(".requests").open("ab") as counter,
        ):  # a byte a request: no kill leaves it half-written
            number = counter.tell()
            counter.write(b".")
        fault = self.plan[number] if number < len(self.plan) else "ok"
        if fault == "slow":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "garbled":
            self.answer_bytes(200, b'{"scores": [1.0, ')
        elif fault == "list":
            self.answer_bytes(200, b"[1.0]")
        elif fault == "short":
            self.answer(200, {"scores": [1.0]})
        elif fault == "429":
            self.answer(429, {"error": {"message": "too many requests"}}, {"Retry-After": "0.2"})
        elif fault == "key":
            self.answer(
                401, {"error": {"message": f"no such key: {self.headers['authorization']}"}}
            )
        elif fault.isdigit():
            self.answer(int(fault), {"detail": f"planned {fault}"})
        else:
            self.work(body, shift=0.5 if fault == "shifted" else 0.0)

    def work(self, body: bytes, shift: float) -> None:
        if self.upstream:
            status, content = self.forward(body)
            self.answer_bytes(status, content)
            self.note({"path": self.path, "status": status})
            return
        time.sleep(PAUSE)
        asked = json.loads(body)
        texts = list(zip(asked["prompts"], asked["responses"], strict=True))
        self.answer(200, {"scores": [score(p, r) + shift for p, r in texts]})
        self.note(texts)

    def note(self, what: object) -> None:
        with self.lock, self.log.open("a") as handle:
            handle.write(json.dumps(what) + "\n")

    def forward(self, body: bytes | None) -> tuple[int, bytes]:
        request = urllib.request.Request(
            self.upstream + self.path, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 502, json.dumps({"detail": f"nothing behind me: {error}"}).encode()

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.answer_bytes(
            status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers
        )

    def answer_bytes(
        self, status: int, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    Server.log = Path(sys.argv[2])
    Server.plan = json.loads(sys.argv[3]) if len(sys.argv) > 3 else []
    Server.upstream = sys.argv[4] if len(sys.argv) > 4 else None
    Server.protocol_version = "HTTP/1.1"
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
