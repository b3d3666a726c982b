"""What a person sees while a run plays: bars and live lines on a terminal, plain lines in a pipe,
no colour under NO_COLOR."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios

import pytest

from constrained_dpo.progress import duration
from constrained_dpo.run.status import expected_round_seconds
from tests.end_to_end.test_kill import SMALL
from tests.helpers.cli import CDPO, cdpo
from tests.helpers.paths import QUICKSTART

# SGR foreground colours; bold and dim are not colours
COLOUR = re.compile(r"\x1b\[[0-9;]*3[1-6]m")


def on_terminal(*arguments, **environment) -> str:
    """Everything a command writes to a terminal of 40 × 140 characters."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    env = plain | {"TERM": "xterm-256color"} | environment
    process = subprocess.Popen(
        [*CDPO, *map(str, arguments)], stdin=follower, stdout=follower, stderr=follower, env=env
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the terminal's other end is closed: the process has ended
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("terminal") / "run"
    cdpo("init", QUICKSTART, path, *[part for s in SMALL for part in ("-s", s)], check=0)
    return path


def test_a_terminal_sees_bars_with_eta_and_a_live_line_per_phase(run):
    seen = on_terminal("round", run)
    assert re.search(r"pool: sample and score: +\d+%\|.*\d+/\d+ \[[0-9:]+<[0-9:?]+", seen)
    assert re.search(r"fit: +\d+%\|.*\d+/30 \[[0-9:]+<[0-9:?]+", seen)
    for phase in (
        "prepare: sample and score π_ref on fit prompts",
        "round 0: fit",
        "round 0: rescore",
    ):
        assert f"{phase} ...\r" in seen and re.search(
            rf"\r\x1b\[K{re.escape(phase)}: [0-9.]+ (s|min)", seen
        )


def test_a_pipe_sees_plain_lines_and_only_results_on_stdout(run):
    result = cdpo("round", run, "--json", check=0)
    assert (
        "\r" not in result.stderr
        and "%|" not in result.stderr
        and "\x1b" not in result.stderr + result.stdout
    )
    assert re.search(
        r"^round 1: fit \.\.\.\nround 1: fit: [0-9.]+ (s|min)$", result.stderr, re.MULTILINE
    )
    assert json.loads(result.stdout)["round"] == 1


def test_status_tells_verdict_and_expected_time_and_colours_respect_no_color(run):
    content = json.loads(cdpo("status", run, "--json", check=0).stdout)
    assert (
        content["rounds_left"] == 0
        and content["seconds_left"] == 0
        and content["seconds_per_round"] > 1
    )
    assert content["rounds"][1]["test"]["verdicts"]["harmless"] in (
        "satisfied",
        "violated",
        "undecided",
    )
    coloured, plain = on_terminal("status", run), on_terminal("status", run, NO_COLOR="1")
    assert (
        COLOUR.search(coloured)
        and not COLOUR.search(plain)
        and content["rounds"][0]["verdict"] in plain
    )
    assert COLOUR.search(on_terminal("--help")) and not COLOUR.search(
        on_terminal("--help", NO_COLOR="1")
    )


def test_a_run_that_is_done_still_answers_in_json(run):
    assert json.loads(cdpo("run", run, "--json", check=0).stdout)["round"] == 1
    found = json.loads(cdpo("check", run, "--json", check=0).stdout)
    assert (
        found["recomputed"] == 3
        and found["lambda"][2] == json.loads((run / "state.json").read_text())["lambda"][2]
    )
    assert json.loads(cdpo("prepare", run, "--json", check=0).stdout)["prompts"] == {
        "dual": 24,
        "test": 12,
    }


@pytest.mark.parametrize("module", ["constrained_dpo.cli.main", "data_prep.cli"])
def test_shell_completion_is_printed(module):
    command = [CDPO[0], "-c", f"from {module} import main; main()", "--show-completion", "bash"]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert found.returncode == 0 and "complete" in found.stdout


def test_expected_time_of_a_round_leaves_out_phases_that_were_resumed():
    rounds = [
        {"seconds": {"relabel": 1.0, "fit": None, "rescore": 4.0}},
        {"seconds": {"relabel": 1.0, "fit": 10.0, "rescore": 6.0}},
    ]
    assert expected_round_seconds(rounds) == 16.0 and expected_round_seconds(rounds[:1]) is None
    assert [duration(s) for s in (4.0, 120, 7200)] == ["4.0 s", "2.0 min", "2.0 h"]
