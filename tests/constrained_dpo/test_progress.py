"""The pace of bars against work of known length, and what is told to a file."""

import json
import time

import pytest

from constrained_dpo.progress import Bar, Pace, reporting, timed


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def worked(pace: Pace, clock, seconds: list[float], units: int = 1) -> None:
    for taken in seconds:
        clock(taken)
        pace.step(units)


def test_units_that_take_the_same_leave_what_is_true(clock):
    pace = Pace(100, 0, None)
    worked(pace, clock, [2.0] * 10)
    assert pace.seconds_left == pytest.approx(180.0)
    clock(1.5)  # half-way through the next unit
    assert pace.seconds_left == pytest.approx(178.5)


def test_a_first_unit_that_pays_for_all_does_not_count(clock):
    pace = Pace(50, 0, None)
    worked(pace, clock, [30.0, 1.0, 1.0, 1.0])
    assert pace.seconds_left == pytest.approx(46.0)


def test_what_an_earlier_process_did_says_nothing_of_the_pace(clock):
    pace = Pace(1000, 900, None)
    worked(pace, clock, [5.0, 5.0], units=10)
    assert pace.seconds_left == pytest.approx(40.0)


def test_units_of_several_sizes_are_weighed(clock):
    pace = Pace(40, 0, None)
    for taken, units in ((1.0, 8), (3.0, 16), (1.5, 8)):
        clock(taken)
        pace.step(units)
    assert pace.seconds_left == pytest.approx(8 * 4.5 / 24)


def test_before_the_first_unit_the_pace_of_the_same_work_earlier_counts(clock):
    assert Pace(10, 0, None).seconds_left is None
    pace = Pace(10, 0, 3.0)
    clock(4.0)
    assert pace.seconds_left == pytest.approx(26.0)
    clock(100.0)  # late, and nothing is done: it does not claim to be
    assert pace.seconds_left == pytest.approx(6.0)
    pace.step(10)
    assert pace.seconds_left == 0.0


def test_a_later_bar_of_a_kind_begins_with_the_last_ones_pace(clock, tmp_path):
    file = tmp_path / "progress.json"
    with reporting(file):
        with Bar("first", total=4, unit="step", kind="fit") as bar:
            for _ in range(4):
                clock(7.0)
                bar.step()
        with Bar("second", total=3, unit="step", kind="fit"):
            assert json.loads(file.read_text())["bar"]["seconds_left"] == pytest.approx(21.0)
        with Bar("other", total=3, unit="step", kind="sample"):
            assert json.loads(file.read_text())["bar"]["seconds_left"] is None
    assert not file.exists()


def test_the_first_bar_of_a_kind_begins_with_the_pace_of_one_like_it(clock, tmp_path):
    file = tmp_path / "progress.json"
    with reporting(file):
        with Bar("first", total=2, unit="response", kind="π_ref") as bar:
            clock(3.0)
            bar.step(2)
        assert json.loads(file.read_text())["bar"] is None
        Bar("next", total=10, unit="response", kind="policy", like=("π_ref", 2.0))
        assert json.loads(file.read_text())["bar"]["seconds_left"] == pytest.approx(30.0)


def test_a_phase_and_its_bar_are_on_disk_while_they_are_under_way(tmp_path):
    file, seen = tmp_path / "progress.json", []

    def work() -> None:
        with Bar("pool", total=9, unit="response", kind="sample", done=3) as bar:
            bar.step(2)
            bar._tell(hurried=False)
            seen.append(json.loads(file.read_text()))

    with reporting(file):
        timed("prepare: sample", work)
        seen.append(json.loads(file.read_text()))
    during, after = seen
    assert during["phase"] == "prepare: sample" and after["phase"] is None
    assert (during["bar"]["done"], during["bar"]["total"]) == (5, 9)
    assert after["bar"] is None


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path):
    with reporting(tmp_path / "no-such-folder" / "progress.json"):
        timed("prepare", lambda: Bar("pool", total=1, unit="response", kind="sample").step())
