"""The http scorer against a real server process: faults by plan, kills of either side; nothing
lost, nothing scored twice."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

import data_prep.http
from data_prep.errors import UserError
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.scoring import make_scorer, score_texts
from data_prep.scorers.settings import HttpScorerSettings
from tests.helpers.cli import cdpo
from tests.helpers.fault_server import score
from tests.helpers.servers import answered_texts, start_fault_server

PROMPTS = [f"prompt {i % 7}" for i in range(60)]
RESPONSES = [f"answer {'x' * i}" for i in range(60)]
EXPECTED = [score(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(data_prep.http, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve(tmp_path):
    """Starts a scoring server with a plan of faults; killed at the end."""
    started = []

    def start(*plan: str):
        started.append(start_fault_server(tmp_path, plan))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def settings(server, **more) -> HttpScorerSettings:
    base = {
        "type": "http",
        "url": f"{server.url}/score",
        "version": "1",
        "batch_size": 4,
        "concurrency": 3,
        "timeout": 1.0,
    }
    return HttpScorerSettings(**(base | more))


def scored(scorer, cache=None) -> np.ndarray:
    how = {"options": ScorerOptions(), "name": "g", "cache": cache or ScoreCache(None)}
    return score_texts(scorer, PROMPTS, RESPONSES, **how)


def kept(cache: ScoreCache) -> int:
    """How many scores a cache holds."""
    return cache.database.execute("SELECT COUNT(*) FROM scores").fetchone()[0]


def test_faults_are_tried_again_and_every_text_is_answered_once(serve, tmp_path):
    faults = ["500", "slow", "429", "garbled", "list", "short", "drop", "503"]
    server = serve("ok", *faults, "ok", "500")
    np.testing.assert_array_equal(scored(make_scorer(settings(server))), EXPECTED)
    once = dict.fromkeys(zip(PROMPTS, RESPONSES, strict=True), 1)
    assert Counter(answered_texts(tmp_path)) == Counter(once)
    # Batches, and one more try per fault.
    assert (tmp_path / "answered.requests").stat().st_size == 15 + 9


def test_a_server_killed_midway_and_restarted_loses_nothing(serve, tmp_path):
    server = serve()
    scorer, cache = make_scorer(settings(server)), ScoreCache(tmp_path / "scores.sqlite")
    restart = threading.Timer(0.4, lambda: server.start(wait=False))
    arrived, put = 0, cache.put

    def put_and_kill(new):
        nonlocal arrived
        put(new)
        arrived += 1
        if arrived == 5:
            server.kill()
            restart.start()

    cache.put = put_and_kill
    np.testing.assert_array_equal(scored(scorer, cache), EXPECTED)
    restart.join()
    counts = Counter(answered_texts(tmp_path))
    assert set(counts) <= set(zip(PROMPTS, RESPONSES, strict=True))
    # An answer on its way when the server died may have been lost between the two; no other
    # text was answered twice.
    assert sum(n - 1 for n in counts.values()) <= 3 * 4


def test_a_killed_command_goes_on_where_it_stopped(serve, tmp_path):
    server = serve()
    answers, output = tmp_path / "answers.parquet", tmp_path / "scored.parquet"
    cache = tmp_path / "scores.sqlite"
    pd.DataFrame({"prompt": PROMPTS, "response": RESPONSES}).to_parquet(answers)
    scorer = {"type": "http", "url": f"{server.url}/score", "version": "1"}
    scorer |= {"batch_size": 4, "concurrency": 1}
    words = ["score", answers, "-o", output, "--name", "g", "--scorer", json.dumps(scorer)]
    words += ["--cache", cache]
    main = "from data_prep.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", main, *map(str, words)], stderr=subprocess.DEVNULL
    )
    while len(answered_texts(tmp_path)) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = answered_texts(tmp_path)
    assert 16 <= kept(ScoreCache(cache)) < len(RESPONSES), (
        "the kill came too late, or what had arrived was not kept"
    )
    cdpo("data", *words, check=0)
    np.testing.assert_array_equal(pd.read_parquet(output)["g"], EXPECTED)
    twice = [text for text, n in Counter(answered_texts(tmp_path)).items() if n > 1]
    assert len(twice) <= 4, "more was scored again than the one batch that was under way"
    assert set(twice) <= set(before[-4:])


def test_a_refused_request_is_one_clear_error_at_once_and_the_rest_is_kept(serve, tmp_path):
    server = serve("ok", "ok", "422")
    cache = ScoreCache(tmp_path / "scores.sqlite")
    with pytest.raises(UserError, match=r"/score: HTTP 422: planned 422$"):
        scored(make_scorer(settings(server)), cache)
    assert kept(cache) == len(answered_texts(tmp_path)) >= 8


def test_a_server_that_goes_on_failing_is_named_with_what_it_said(serve):
    server = serve(*["garbled"] * 4, *["503"] * 3)
    garbled = r"the answer is not JSON: '\{\"scores\": \[1.0,' \(4 tries\)"
    with pytest.raises(UserError, match=garbled):
        scored(make_scorer(settings(server, concurrency=1)))
    with pytest.raises(UserError, match=r"HTTP 503: planned 503 \(3 tries\); see to the server"):
        scored(make_scorer(settings(server, concurrency=1, retries=2)))
    server.kill()
    # Never reached by this scorer: not tried for minutes.
    with pytest.raises(UserError, match=r"ConnectError.*\(3 tries\)"):
        scored(make_scorer(settings(server)))


def test_the_key_comes_from_the_environment_and_shows_nowhere(serve, monkeypatch):
    server = serve("key")
    with pytest.raises(UserError, match="the environment variable CDPO_TEST_KEY is not set"):
        make_scorer(settings(server, api_key_env="CDPO_TEST_KEY"))
    monkeypatch.setenv("CDPO_TEST_KEY", "sk-very-secret")
    scorer = make_scorer(settings(server, api_key_env="CDPO_TEST_KEY", concurrency=1))
    refusal = r"HTTP 401: no such key: Bearer \*\*\*; is the key in CDPO_TEST_KEY right\?"
    with pytest.raises(UserError, match=refusal):
        scored(scorer)
    assert "secret" not in scorer.fingerprint


def test_the_version_stands_for_the_weights(serve, monkeypatch):
    server = serve()
    one, two = (make_scorer(settings(server, version=v)).fingerprint for v in ("1", "2"))
    told = settings(server, version=None, version_url=f"{server.url}/version")
    monkeypatch.setenv("CDPO_TEST_URL", f"{server.url}/score")
    moved = make_scorer(settings(server, url="$CDPO_TEST_URL"))
    assert len({one, two, make_scorer(told).fingerprint, moved.fingerprint}) == 4
    np.testing.assert_array_equal(scored(moved), EXPECTED)
    # Another place, the same server as far as a run is concerned.
    monkeypatch.setenv("CDPO_TEST_URL", "http://127.0.0.1:9/score")
    assert make_scorer(settings(server, url="$CDPO_TEST_URL")).fingerprint == moved.fingerprint


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": None},
        {"url": "localhost:80"},
        {"url": "http://me:secret@host/"},
        {"format": "classify"},
    ],
)
def test_settings_that_identify_no_server_are_refused(wrong):
    base = {"type": "http", "url": "http://127.0.0.1:9/score", "version": "1"}
    HttpScorerSettings(**base)
    with pytest.raises(ValidationError):
        HttpScorerSettings(**(base | wrong))
