"""What a person sees while a run plays: bars and live lines on a terminal, plain lines in a pipe,
no colour under NO_COLOR."""

import io
import json
import re

import pytest

import data_prep.cli.main
from constrained_dpo.cli import main as cdpo_main
from constrained_dpo.progress import duration
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.status import expected_round_seconds
from data_prep.quickstart import build_policy
from tests.helpers.cli import called
from tests.helpers.paths import QUICKSTART, SMALL
from tests.helpers.terminal import on_terminal, process_on_terminal

# SGR foreground colours; bold and dim are not colours
COLOUR = re.compile(r"\x1b\[[0-9;]*3[1-6]m")


def new_run(path) -> RunDirectory:
    """A run of a few prompts; the model is named by its folder, so that nothing is enumerated."""
    few = ["prompts.max_fit=8", "prompts.max_test=4", "fit.steps=12", "fit.warmup_steps=0"]
    return init_run(QUICKSTART, path, [*SMALL, *few, f"policy.model={build_policy()}"])


def assert_bars_and_live_lines(seen: str) -> None:
    assert re.search(r"pool: sample and score: +\d+%\|.*\d+/\d+ \[[0-9:]+<[0-9:?]+", seen)
    assert re.search(r"fit: +\d+%\|.*\d+/12 \[[0-9:]+<[0-9:?]+", seen)
    prepare = "prepare: sample and score π_ref on fit prompts"
    for phase in (prepare, "round 0: fit", "round 0: rescore"):
        assert f"{phase} ...\r" in seen
        assert re.search(rf"\r\x1b\[K{re.escape(phase)}: [0-9.]+ (s|min)", seen)


def test_a_terminal_sees_bars_with_eta_and_a_live_line_per_phase(tmp_path):
    seen = on_terminal("round", new_run(tmp_path / "run").path)
    assert_bars_and_live_lines(seen)
    assert "verdict" in seen


def test_a_pipe_sees_plain_lines_and_only_results_on_stdout(small_run):
    """What `cdpo run --json` wrote."""
    stdout, stderr = ((small_run.path.parent / name).read_text() for name in ("stdout", "stderr"))
    assert not [sign for sign in ("\r", "%|", "\x1b") if sign in stderr]
    assert "\x1b" not in stdout and json.loads(stdout)["round"] == 1
    lines = r"^round 1: fit \.\.\.\nround 1: fit: [0-9.]+ (s|min)$"
    assert re.search(lines, stderr, re.MULTILINE)


@pytest.mark.slow
def test_a_process_on_a_terminal_sees_the_same(tmp_path):
    assert_bars_and_live_lines(process_on_terminal("round", new_run(tmp_path / "run").path))


def test_status_is_coloured_unless_no_color(small_run):
    coloured, plain = (
        on_terminal("status", small_run.path, **colour) for colour in ({}, {"NO_COLOR": "1"})
    )
    assert COLOUR.search(coloured) and not COLOUR.search(plain)
    assert RoundRecord.read(small_run.round_file(0)).verdict in plain


def test_help_is_coloured_unless_no_color():
    assert COLOUR.search(on_terminal("--help"))
    assert not COLOUR.search(on_terminal("--help", NO_COLOR="1"))


@pytest.mark.parametrize("module", [cdpo_main, data_prep.cli.main])
def test_shell_completion_is_printed(module, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    out = io.StringIO()
    assert called(module.main, ["cdpo", "--show-completion", "bash"], out, io.StringIO()) == 0
    assert "complete" in out.getvalue()


def test_expected_time_of_a_round_leaves_out_phases_that_were_resumed(small_run):
    record = RoundRecord.read(small_run.round_file(0))
    times = [
        {"relabel": 1.0, "fit": None, "rescore": 4.0},
        {"relabel": 1.0, "fit": 10.0, "rescore": 6.0},
    ]
    rounds = [record.model_copy(update={"seconds": seconds}) for seconds in times]
    assert expected_round_seconds(rounds) == 16.0
    assert expected_round_seconds(rounds[:1]) is None


def test_a_duration_is_in_the_unit_a_person_would_use():
    assert [duration(s) for s in (4.0, 120, 7200)] == ["4.0 s", "2.0 min", "2.0 h"]
