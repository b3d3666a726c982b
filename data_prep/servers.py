"""Servers that answer alike: requests are spread over them, and one that is gone is left out while
others serve."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from tqdm import tqdm

from data_prep.errors import ServerGone, ServerRefused
from data_prep.http import Check, HttpClient, RequestSettings

log = logging.getLogger(__name__)

RENEWALS = 3
"""How often one call makes a server ready again that no longer knows what was loaded on it."""

NOT_THERE = 404


MakeReady = Callable[[str, bool], None]
"""Makes a server ready before it is sent anything: told the server, and whether to start anew,
since the server has said 404."""


@dataclass(frozen=True)
class _Sent:
    """A request under way. ready: how often its server had been made ready when it was sent."""

    index: int
    server: str
    ready: int


@dataclass
class _Call:
    """One `post_all` under way: what is to be sent, and what is under way to which server."""

    bodies: Sequence[dict]
    todo: list[int]
    # by server, how often it was made ready
    ready: dict[str, int] = field(default_factory=dict)
    waiting: dict[Future, "_Sent"] = field(default_factory=dict)
    failure: BaseException | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def under_way(self, server: str) -> int:
        return sum(sent.server == server for sent in self.waiting.values())

    def fail(self, error: BaseException) -> None:
        """Send nothing more; the others finish the try that they are in."""
        self.failure = self.failure or error
        self.stop.set()


class Servers:
    """A client of each server, by its URL (without the endpoint's path).

    A server that is gone is left out with a notice while others serve, and asked again at the next
    call; the last one is waited for as `RequestSettings.retries` says. A refusal (4xx) is an error
    whoever says it. Raises UserError at once where the key's environment variable is not set.
    """

    def __init__(self, settings: RequestSettings, urls: Sequence[str]) -> None:
        self.settings = settings
        self._out: set[str] = set()
        self.clients = {url: HttpClient(settings, self._alone) for url in urls}

    @property
    def serving(self) -> list[str]:
        """The servers that are not left out."""
        return [url for url in self.clients if url not in self._out]

    def _alone(self) -> bool:
        return len(self.serving) <= 1

    def each(self, action: Callable[[str, HttpClient], None]) -> None:
        """Do something on every server that is there; raises ServerGone where none is, and what the
        action raises but for that."""
        self._look_again()
        for url in self.serving:
            try:
                action(url, self.clients[url])
            except ServerGone as error:
                self._leave_out(url, error)

    def post_all(
        self,
        path: str,
        bodies: Sequence[dict],
        *,
        desc: str,
        check: Check | None = None,
        make_ready: MakeReady | None = None,
    ) -> Iterator[tuple[int, str, dict]]:
        """(index, server, answer) of every body, in the order in which they arrive; at most
        `concurrency` requests are under way to a server.

        path: appended to the server's URL. After a failure nothing more is sent, but what was under
        way is waited for and yielded before the error is raised, so that what was worked out is not
        lost.
        """
        self._look_again()
        call = _Call(bodies, list(range(len(bodies)))[::-1])
        size = self.settings.concurrency * len(self.clients)
        bar = tqdm(total=len(bodies), desc=desc, unit="request", disable=None, leave=False)
        with ThreadPoolExecutor(size) as pool, bar:
            try:
                while True:
                    self._send(call, path, check, make_ready, pool)
                    if not call.waiting:
                        break
                    for future in wait(call.waiting, return_when=FIRST_COMPLETED).done:
                        sent = call.waiting.pop(future)
                        if (error := future.exception()) is not None:
                            self._mend(call, sent, error, make_ready)
                            continue
                        bar.update()
                        yield sent.index, sent.server, future.result()
            finally:
                call.stop.set()
        if call.failure is not None:
            raise call.failure

    def _send(
        self,
        call: _Call,
        path: str,
        check: Check | None,
        make_ready: MakeReady | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Give every server as much as it may have under way, in turns."""
        progress = True
        while progress and call.todo and call.failure is None:
            progress = False
            for url in self.serving:
                if not call.todo or call.under_way(url) >= self.settings.concurrency:
                    continue
                if make_ready is not None and url not in call.ready:
                    self._prepare(call, url, make_ready, False)
                    if url not in call.ready:
                        continue
                index = call.todo.pop()
                client, body = self.clients[url], call.bodies[index]
                future = pool.submit(client.post_until, f"{url}{path}", body, check, call.stop)
                call.waiting[future] = _Sent(index, url, call.ready.get(url, 0))
                progress = True

    def _prepare(self, call: _Call, url: str, make_ready: MakeReady, again: bool) -> None:
        """Make a server ready; it is left out where it is gone, and nothing more is sent where
        another thing is wrong."""
        try:
            make_ready(url, again)
            call.ready[url] = call.ready.get(url, 0) + 1
        except ServerGone as error:
            self._leave_out_or_fail(call, url, error)
        except Exception as error:
            call.fail(error)

    def _mend(
        self, call: _Call, sent: _Sent, error: BaseException, make_ready: MakeReady | None
    ) -> None:
        """What follows from a request that came to nothing: it is sent elsewhere, or once more to a
        server that was made ready anew, or it is the call's failure."""
        url = sent.server
        lost = isinstance(error, ServerRefused) and error.status == NOT_THERE
        if call.failure is not None:
            return
        if isinstance(error, ServerGone):
            call.todo.append(sent.index)
            if url in self.serving:
                self._leave_out_or_fail(call, url, error)
        elif lost and make_ready is not None and sent.ready <= RENEWALS:
            call.todo.append(sent.index)
            if sent.ready == call.ready[url]:  # else another request has said so already
                self._prepare(call, url, make_ready, True)
        else:
            call.fail(error)

    def _leave_out_or_fail(self, call: _Call, url: str, error: ServerGone) -> None:
        try:
            self._leave_out(url, error)
        except ServerGone as last:
            call.fail(last)

    def _leave_out(self, url: str, error: ServerGone) -> None:
        """Go on without a server; raises the error where it was the last one."""
        others = [other for other in self.serving if other != url]
        if not others:
            raise error
        self._out.add(url)
        log.warning("%s: left out; %s", url, f"{len(others)} of {len(self.clients)} serve: {error}")

    def _look_again(self) -> None:
        """Ask those that were left out whether they are back."""
        for url in sorted(self._out):
            if self.clients[url].answers(url):
                self._out.discard(url)
                log.info("%s: serves again", url)
