"""Requests to one server and to several: what a failure is worth, what is said of it and when, and
who goes on when one is gone."""

import logging

import pytest

import data_prep.http
from data_prep.errors import ServerGone, ServerRefused, UserError
from data_prep.http import HttpClient, RequestSettings
from data_prep.scorers.scoring import make_scorer
from data_prep.scorers.settings import HttpScorerSettings
from data_prep.servers import Servers
from data_prep.urls import check_urls, resolve_urls
from tests.helpers.fault_server import score
from tests.helpers.servers import answered_texts, start_fault_server

BODIES = [{"prompts": [f"p{i}"], "responses": [f"r{'x' * i}"]} for i in range(30)]
EXPECTED = [score(b["prompts"][0], b["responses"][0]) for b in BODIES]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(data_prep.http, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve(tmp_path):
    """Starts scoring servers, each with a plan of faults and a folder."""
    started = []

    def start(*plan: str):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(start_fault_server(folder, plan))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def servers_of(*started, **more) -> Servers:
    settings = RequestSettings(**({"concurrency": 2, "timeout": 5.0, "retries": 4} | more))
    return Servers(settings, [server.url for server in started])


def spread(servers: Servers) -> tuple[list[float], list[str]]:
    """The score of every body, in order, and who gave it."""
    values, who = [0.0] * len(BODIES), [""] * len(BODIES)
    for index, url, answer in servers.post_all("/score", BODIES, desc="score"):
        (values[index],), who[index] = answer["scores"], url
    return values, who


def test_several_servers_share_the_work(serve):
    started = [serve(), serve(), serve()]
    values, who = spread(servers_of(*started))
    assert values == EXPECTED
    assert all(who.count(server.url) > 3 for server in started)


def test_a_server_that_dies_is_left_out_with_a_notice_and_comes_back(serve, caplog):
    alive, dies = serve(), serve("ok", "ok", *["drop"] * 40)
    servers = servers_of(alive, dies)
    with caplog.at_level(logging.WARNING):
        values, who = spread(servers)
    assert values == EXPECTED and servers.serving == [alive.url]
    assert who.count(dies.url) == 2
    assert f"{dies.url}: left out; 1 of 2 serve" in caplog.text
    dies.kill()
    assert spread(servers)[1] == [alive.url] * len(BODIES)
    (dies.log.parent / "answered.requests").write_bytes(b"." * 99)  # its plan is over
    dies.start()
    assert spread(servers)[1].count(dies.url) > 3


def test_where_all_are_gone_the_first_words_are_said(serve):
    one, two = serve(*["500"] * 99), serve(*["500"] * 99)
    with pytest.raises(ServerGone, match="HTTP 500: planned 500"):
        spread(servers_of(one, two))


def test_a_refusal_is_at_once_everybodys(serve, tmp_path):
    one, two = serve("422"), serve()
    servers = servers_of(one, two)
    with pytest.raises(ServerRefused, match="HTTP 422: planned 422"):
        spread(servers)
    assert servers.serving == [one.url, two.url]


@pytest.mark.parametrize(("fault", "tries"), [("500", 4), ("503", 7), ("drop", 7), ("422", 1)])
def test_a_failure_is_tried_again_as_often_as_its_kind_is_worth(serve, tmp_path, fault, tries):
    client = HttpClient(RequestSettings(retries=6, timeout=5.0))
    server = serve("ok", *[fault] * 50)
    client.post(f"{server.url}/score", BODIES[0])
    with pytest.raises(UserError):
        client.post(f"{server.url}/score", BODIES[1])
    assert (tmp_path / "0" / "answered.requests").stat().st_size == 1 + tries


def test_the_first_words_of_a_server_that_dies_are_said_when_they_come(serve, caplog):
    """And stay in the error, though all that follows is silence."""
    server = serve("ok", "500")
    client = HttpClient(RequestSettings(retries=3, timeout=5.0))
    client.post(f"{server.url}/score", BODIES[0])
    said: list[str] = []

    class Kills(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
            server.kill()

    logger, handler = logging.getLogger("data_prep"), Kills()
    logger.addHandler(handler)
    try:
        with pytest.raises(ServerGone, match=r"HTTP 500: planned 500; then ConnectError"):
            client.post(f"{server.url}/score", BODIES[1])
    finally:
        logger.removeHandler(handler)
    assert said == [f"{server.url}/score: HTTP 500: planned 500; tried again up to 3 times"]


def test_scorers_on_several_servers_give_the_same_scores_or_are_refused(serve, tmp_path):
    one, two, other = serve(), serve(), serve(*["shifted"] * 9)
    prompts, responses = ([b[key][0] for b in BODIES] for key in ("prompts", "responses"))

    def scorer(*started):
        urls = [f"{server.url}/score" for server in started]
        return make_scorer(
            HttpScorerSettings(type="http", url=urls, version="1", batch_size=2, concurrency=1)
        )

    assert scorer(one, two).score(prompts, responses).tolist() == EXPECTED
    assert min(len(answered_texts(tmp_path / name)) for name in "01") > 6
    versions = [f"{server.url}/version" for server in (one, two)]
    HttpScorerSettings(type="http", url=versions, version_url=versions)
    with pytest.raises(UserError, match="all servers of a scorer must serve the same model"):
        scorer(one, other).score(prompts, responses)


def test_lists_of_urls(monkeypatch):
    monkeypatch.setenv("CDPO_TEST_URLS", "http://a:1/v1/, http://b:1/v1")
    assert resolve_urls("$CDPO_TEST_URLS") == ["http://a:1/v1", "http://b:1/v1"]
    assert resolve_urls(["http://c:1", "$CDPO_TEST_URLS"])[0] == "http://c:1"
    for wrong in ([], ["http://a:1", "http://a:1"], ["http://a:1", "b:2"]):
        with pytest.raises(ValueError, match=r"give one URL|not a URL"):
            check_urls(wrong)
