"""JSON over HTTP for scorers, samplers and judges: bounded concurrency, retries by the kind of
failure, errors that name the server's words.

Several servers that answer alike: `data_prep.servers`.
"""

import logging
import os
import random
import threading
from collections.abc import Callable
from typing import Literal

import httpx
from pydantic import Field
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

from data_prep.errors import ServerGone, ServerRefused, ServerUnreachable, UserError
from data_prep.http_answers import GarbledAnswer, read_object, retry_after, server_words
from data_prep.settings import Settings

log = logging.getLogger(__name__)


class RequestSettings(Settings):
    """How a server is asked. The key itself is never in a recipe: only the name of the environment
    variable that holds it."""

    api_key_env: str | None = Field(
        None, description="environment variable with the server's API key (sent as a bearer token)"
    )
    timeout: float = Field(
        120.0, gt=0, description="seconds until a request without an answer is tried again"
    )
    retries: int = Field(
        10,
        ge=0,
        description="tries after the first on 429, 503, timeouts and lost connections (10: about "
        "4 minutes; 3 at most on other 5xx)",
    )
    concurrency: int = Field(8, ge=1, le=1024, description="requests under way at once")


FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second try, doubled with every further one up to the longest."""


UNREACHED_RETRIES = 2
"""Tries after the first at a server that has not answered this process yet: more likely a wrong
address than a restart."""


GARBLED_RETRIES = 3
"""Tries after the first where the answer is no JSON object or lacks what was asked for: a server
that does so thrice will go on."""


FAILED_RETRIES = 3
"""Tries after the first where the server's own code fails (HTTP 500): the same request mostly fails
again, and what it says is wanted soon."""


BUSY_STATUS = frozenset({408, 425, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""The server, or what stands before it, says: later."""


FAILED_STATUS = frozenset({500, 507, 508})


Failure = Literal["lost", "busy", "failed", "garbled"]
"""Why a try may be repeated: no answer; an answer that says later; an error of the server's own
code; an answer that lacks what was asked for."""


class _TryAgain(Exception):
    """A try that may be repeated; pause: seconds that the server asks to wait."""

    def __init__(self, problem: str, kind: Failure, pause: float | None = None) -> None:
        super().__init__(problem)
        self.kind, self.pause = kind, pause or 0.0


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: doubled each time and spread, at least what the server asks."""
    backoff = wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)(state)
    error = state.outcome.exception() if state.outcome else None
    pause_asked = error.pause if isinstance(error, _TryAgain) else 0.0
    return max(backoff * random.SystemRandom().uniform(0.5, 1.0), pause_asked)


Check = Callable[[dict | None, dict], None]
"""Told a request's body (None for a GET) and its answer; raises GarbledAnswer where that lacks what
was asked for."""


class HttpClient:
    """Asks one server. Safe to use from several threads; `close` when done (or use it in a `with`).

    The first words of a failure are logged when they come, not when the tries are used up: a server
    that dies says why once, and is silent afterwards. patient: whether to wait for one that was
    there before, as for a restart. Raises UserError at once where the key's environment variable is
    not set.
    """

    def __init__(
        self, settings: RequestSettings, patient: Callable[[], bool] = lambda: True
    ) -> None:
        self.settings, self.patient = settings, patient
        self._key = _read_key(settings.api_key_env)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(
            max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency
        )
        self._client = httpx.Client(timeout=settings.timeout, limits=limits, headers=headers)
        self._reached = False
        self._trouble: str | None = None  # the first words since the last good answer

    def __enter__(self) -> "HttpClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def get(self, url: str, check: Check | None = None) -> dict:
        """The JSON object at a URL; raises as `post`."""
        return self._ask("GET", url, None, check, threading.Event())

    def post(self, url: str, body: dict, check: Check | None = None) -> dict:
        """The JSON object that answers `body`.

        Raises UserError naming the URL and the server's message: at once for a request that it
        refuses (ServerRefused), after the retries of its kind for anything else (ServerGone); its
        kind ServerUnreachable after few tries where the server has not answered this client yet.
        """
        return self._ask("POST", url, body, check, threading.Event())

    def post_only(self, url: str, body: dict) -> None:
        """Posts what has no JSON object for an answer (vLLM's adapter loading answers a sentence);
        raises as `post`."""
        self._ask("POST", url, body, None, threading.Event(), read=False)

    def post_until(self, url: str, body: dict, check: Check | None, stop: threading.Event) -> dict:
        """As `post`; begin no other try once `stop` is set."""
        return self._ask("POST", url, body, check, stop)

    def _ask(
        self,
        method: str,
        url: str,
        body: dict | None,
        check: Check | None,
        stop: threading.Event,
        read: bool = True,
    ) -> dict:
        """Ask until there is an answer, or enough has been tried; `stop` ends it early."""
        counts: dict[Failure, int] = {}

        def once() -> dict:
            try:
                answer = self._once(method, url, body, check, read)
            except GarbledAnswer as error:
                raise self._noted(url, _TryAgain(str(error), "garbled"), counts) from error
            except _TryAgain as error:
                raise self._noted(url, error, counts) from error
            if self._trouble is not None:
                self._trouble = None
                log.info("%s: answers again", url)
            return answer

        def enough(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            kind: Failure = error.kind if isinstance(error, _TryAgain) else "lost"
            return stop.is_set() or counts[kind] > self._allowed(kind)

        def pause(seconds: float) -> None:
            stop.wait(seconds)

        tries = Retrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=enough,
            wait=_pause,
            sleep=pause,
            reraise=True,
        )
        try:
            return tries(once)
        except _TryAgain as error:
            words = self._scrub(str(error))
            if stop.is_set():
                raise UserError(
                    f"{url}: {words}; given up because another request failed"
                ) from error
            if self._trouble not in (None, words):
                words = f"{self._trouble}; then {words}"
            count = tries.statistics["attempt_number"]
            kind = ServerGone if self._reached else ServerUnreachable
            raise kind(
                f"{url}: {words} ({count} tries); see to the server and run the "
                "same command again, what was answered is kept"
            ) from error

    def answers(self, url: str) -> bool:
        """Try once, without retries, whether there is a server."""
        try:
            self._client.get(url, timeout=min(5.0, self.settings.timeout))
        except httpx.RequestError:
            return False
        return True

    def _allowed(self, kind: Failure) -> int:
        """How many more tries a failure of this kind is worth."""
        allowed = {"garbled": GARBLED_RETRIES, "failed": FAILED_RETRIES}.get(kind)
        if allowed is None:
            waits = self._reached and (kind == "busy" or self.patient())
            allowed = self.settings.retries if waits else UNREACHED_RETRIES
        return min(allowed, self.settings.retries)

    def _noted(self, url: str, error: _TryAgain, counts: dict[Failure, int]) -> _TryAgain:
        """Count a failure, and say the first one of an outage."""
        counts[error.kind] = counts.get(error.kind, 0) + 1
        if self._trouble is None and error.kind != "busy":
            self._trouble = self._scrub(str(error))
            if self._reached:
                more = self._allowed(error.kind)
                log.warning("%s: %s; tried again up to %d times", url, self._trouble, more)
        return error

    def _once(
        self, method: str, url: str, body: dict | None, check: Check | None, read: bool
    ) -> dict:
        try:
            response = self._client.request(method, url, json=body)
        except httpx.RequestError as error:
            words = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise _TryAgain(words, "lost") from error
        self._reached = True
        status = response.status_code
        if status in BUSY_STATUS | FAILED_STATUS:
            kind: Failure = "busy" if status in BUSY_STATUS else "failed"
            words = f"HTTP {status}: {self._message(response)}"
            raise _TryAgain(words, kind, retry_after(response))
        self._refuse(response, url)
        if not read:
            return {}
        answer = read_object(response)
        if check is not None:
            check(body, answer)
        return answer

    def _refuse(self, response: httpx.Response, url: str) -> None:
        status = response.status_code
        if status < 300:
            return
        hint = ""
        if status in (401, 403):
            name = self.settings.api_key_env
            hint = (
                f"; is the key in {name} right?"
                if name
                else "; name the key's environment variable in api_key_env"
            )
        elif status < 400:
            hint = f" (moved to {response.headers.get('location', 'nowhere')}); write that address"
        raise ServerRefused(f"{url}: HTTP {status}: {self._message(response)}{hint}", status)

    def _message(self, response: httpx.Response) -> str:
        return self._scrub(server_words(response))

    def _scrub(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"api_key_env: the environment variable {name} is not set; export it with the "
            "server's API key"
        )
    return key
