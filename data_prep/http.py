"""JSON over HTTP for scorers, samplers and judges: bounded concurrency, retries with back-off,
errors that name the server's words."""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from urllib.parse import urlsplit

import httpx
from pydantic import Field
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential
from tqdm import tqdm

from data_prep.errors import ServerUnreachable, UserError
from data_prep.settings import Settings


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
        description="tries after the first on 429, 5xx, timeouts and lost connections (10: about "
        "4 minutes)",
    )
    concurrency: int = Field(8, ge=1, le=1024, description="requests under way at once")


def check_url(url: str) -> str:
    """The URL as it is, or `$NAME`; raises ValueError where it is neither or holds credentials."""
    if url.startswith("$"):
        if not url[1:].isidentifier():
            raise ValueError(f"{url}: write $NAME, the name of an environment variable")
        return url
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: not a URL; write e.g. http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ValueError("holds a user name or password, which a run would keep; use api_key_env")
    return url


def resolve_url(url: str) -> str:
    """The URL that `url` names, without a slash at its end. Raises UserError where the environment
    variable is not set or no URL."""
    if not url.startswith("$"):
        return url.rstrip("/")
    value = os.environ.get(url[1:], "")
    try:
        if value.startswith("$"):
            raise ValueError(f"{value}: not a URL")
        return check_url(value).rstrip("/")
    except ValueError as error:
        raise UserError(
            f"environment variable {url[1:]}: {error if value else 'is not set'}; export it as "
            "the server's URL"
        ) from error


FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second try, doubled with every further one up to the longest."""


UNREACHED_RETRIES = 2
"""Tries after the first at a server that has not answered this process yet: more likely a wrong
address than a restart."""


GARBLED_RETRIES = 3
"""Tries after the first where the answer is no JSON object or lacks what was asked for: a server
that does so thrice will go on."""


RETRIED_STATUS = frozenset(
    {408, 425, 429, 500, 502, 503, 504, 507, 508, 520, 521, 522, 523, 524, 529}
)


class GarbledAnswer(Exception):
    """An answer that is not what was asked for; raised by the caller's own check too, and tried
    again."""


class _TryAgain(Exception):
    """A try that may be repeated; pause: seconds that the server asks to wait."""

    def __init__(self, problem: str, pause: float | None = None) -> None:
        super().__init__(problem)
        self.pause = pause or 0.0


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

    Raises UserError at once where the key's environment variable is not set.
    """

    def __init__(self, settings: RequestSettings) -> None:
        self.settings = settings
        self._key = _read_key(settings.api_key_env)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(
            max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency
        )
        self._client = httpx.Client(timeout=settings.timeout, limits=limits, headers=headers)
        self._reached = False

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
        refuses (4xx), after the retries for 429, 5xx, timeouts, lost connections and answers that
        are not JSON; its kind ServerUnreachable after few tries where the server has not answered
        this client yet.
        """
        return self._ask("POST", url, body, check, threading.Event())

    def post_only(self, url: str, body: dict) -> None:
        """Posts what has no JSON object for an answer (vLLM's adapter loading answers a sentence);
        raises as `post`."""
        self._ask("POST", url, body, None, threading.Event(), read=False)

    def post_all(
        self, url: str, bodies: Sequence[dict], *, desc: str, check: Check | None = None
    ) -> Iterator[tuple[int, dict]]:
        """(index, answer) of every body, in the order in which they arrive; at most `concurrency`
        requests are under way.

        After a failure nothing more is sent, but what was under way is waited for and yielded
        before the error is raised, so that what the server worked out is not lost.
        """
        failure: BaseException | None = None
        todo = iter(enumerate(bodies))
        waiting: dict[Future, int] = {}
        stop = threading.Event()
        with ThreadPoolExecutor(self.settings.concurrency) as pool, _bar(len(bodies), desc) as bar:
            try:
                while True:
                    while (
                        failure is None
                        and len(waiting) < self.settings.concurrency
                        and (item := next(todo, None)) is not None
                    ):
                        waiting[pool.submit(self._ask, "POST", url, item[1], check, stop)] = item[0]
                    if not waiting:
                        break
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        index = waiting.pop(future)
                        if (error := future.exception()) is not None:
                            failure = failure or error
                            # the others finish the try that they are in, and begin no other
                            stop.set()
                            continue
                        bar.update()
                        yield index, future.result()
            finally:
                stop.set()
        if failure is not None:
            raise failure

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
        garbled = 0

        def once() -> dict:
            nonlocal garbled
            try:
                return self._once(method, url, body, check, read)
            except GarbledAnswer as error:
                garbled += 1
                raise _TryAgain(str(error)) from error

        def enough(state: RetryCallState) -> bool:
            allowed = self.settings.retries if self._reached else UNREACHED_RETRIES
            allowed = min(allowed, self.settings.retries)
            return stop.is_set() or state.attempt_number > allowed or garbled > GARBLED_RETRIES

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
            if stop.is_set():
                raise UserError(
                    f"{url}: {self._scrub(str(error))}; given up because another request failed"
                ) from error
            count = tries.statistics["attempt_number"]
            kind = UserError if self._reached else ServerUnreachable
            raise kind(
                f"{url}: {self._scrub(str(error))} ({count} tries); see to the server and run the "
                "same command again, what was answered is kept"
            ) from error

    def _once(
        self, method: str, url: str, body: dict | None, check: Check | None, read: bool
    ) -> dict:
        try:
            response = self._client.request(method, url, json=body)
        except httpx.RequestError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
        self._reached = True
        if response.status_code in RETRIED_STATUS:
            words = f"HTTP {response.status_code}: {self._message(response)}"
            raise _TryAgain(words, _retry_after(response))
        self._refuse(response, url)
        if not read:
            return {}
        answer = _read_object(response)
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
        raise UserError(f"{url}: HTTP {status}: {self._message(response)}{hint}")

    def _message(self, response: httpx.Response) -> str:
        """The server's own words, from the places where OpenAI-compatible servers put them."""
        try:
            content = response.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            content = response.text
        for key in ("error", "detail", "message"):
            if isinstance(content, dict) and content.get(key):
                content = content[key]
        return self._scrub(_short(content if isinstance(content, str) else json.dumps(content)))

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


def _read_object(response: httpx.Response) -> dict:
    try:
        answer = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GarbledAnswer(f"the answer is not JSON: {_short(response.text)!r}") from error
    if not isinstance(answer, dict):
        raise GarbledAnswer(f"the answer is no JSON object: {_short(response.text)!r}")
    return answer


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait (a number or a date), at most ten minutes; None where it
    does not say."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 600.0)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "…"


def _bar(total: int, desc: str) -> tqdm:
    return tqdm(total=total, desc=desc, unit="request", disable=None, leave=False)
