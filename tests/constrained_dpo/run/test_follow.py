"""`cdpo status` beside a process that holds the run, and `--follow` until it lets go."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from constrained_dpo.cli import follow
from constrained_dpo.progress import Bar, timed
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.status import read_activity
from tests.helpers.cli import CDPO, cdpo
from tests.helpers.terminal import on_terminal


@pytest.fixture
def held(run: RunDirectory):
    """The run held by another thread, which is in the middle of a phase until it is let go."""
    ready, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with Bar("fit", total=40, unit="step", kind="fit") as bar:
            bar.step(30)
            bar._tell(hurried=False)
            ready.set()
            go_on.wait(30)

    def hold() -> None:
        with run.locked():
            timed("round 2: fit", work)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(30)
    yield go_on
    go_on.set()
    thread.join()
    assert not run.progress_file.exists()


def test_the_status_says_what_is_under_way(run, held):
    assert "now: round 2: fit: 30 of 40 steps" in cdpo("status", run.path, check=0).stdout
    activity = json.loads(cdpo("status", run.path, "--json", check=0).stdout)["activity"]
    assert (activity["phase"], activity["process"]) == ("round 2: fit", os.getpid())


def test_without_a_process_nothing_is_under_way(run):
    assert read_activity(run) is None
    assert "now:" not in cdpo("status", run.path, check=0).stdout


def test_what_a_kill_left_is_not_under_way(run):
    ended = subprocess.Popen(["true"])
    ended.wait()
    run.progress_file.write_text(
        json.dumps({"process": ended.pid, "host": os.uname().nodename, "phase": "round 0: fit"})
    )
    assert read_activity(run) is None
    run.progress_file.write_text('{"process": 1')
    assert read_activity(run) is None
    run.progress_file.unlink()


@pytest.mark.parametrize("terminal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_followed_until_its_process_lets_go(run, held, monkeypatch, terminal):
    monkeypatch.setattr(follow, "POLL", 0.05)
    threading.Timer(0.4, held.set).start()
    command = "status", run.path, "--follow"
    seen = on_terminal(*command) if terminal else cdpo(*command, check=0).stdout
    # a line for a phase that does not change; a terminal is painted again and again
    repeated = seen.count("now: round 2: fit: 30 of 40 steps")
    assert repeated > 2 if terminal else repeated == 1
    assert ("now: no process works on it" in seen) == terminal and "next: all 2 rounds" in seen


def test_a_run_that_is_played_is_not_waited_for(run):
    begun = time.monotonic()
    assert "next: all 2 rounds" in cdpo("status", run.path, "--follow", check=0).stdout
    assert time.monotonic() - begun < 5


def test_follow_shows_neither_json_nor_tables(run, refused):
    refused("status", run.path, "--follow", "--json", match="without --json")
    refused("status", run.path.parent, "--follow", match="not a run directory")


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_complaint(run, held):
    process = subprocess.Popen(
        [*CDPO, "status", str(run.path), "--follow"], stdout=subprocess.PIPE, text=True
    )
    assert "round 2: fit" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
