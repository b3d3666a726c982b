"""Ctrl-C, SIGTERM and a full disk: one clear line, the exit code that says which, and nothing lost.
`kill_many.py` does it at scale."""

import os
import resource
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.run.create import init_run
from data_prep.quickstart import build_policy
from data_prep.readers.tables import write_parquet
from data_prep.scorers.cache import ScoreCache
from tests.helpers.cli import CDPO, cdpo
from tests.helpers.moments import when
from tests.helpers.paths import QUICKSTART, SMALL
from tests.helpers.tables import scored_frame


@pytest.fixture
def largest_file():
    """Sets the largest file this process may write, in bytes: a write beyond it fails as on a full
    disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def new_run(path):
    """Named by its folder, the model is not enumerated."""
    return init_run(QUICKSTART, path, [*SMALL, f"policy.model={build_policy()}"])


SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def assert_stopped(run, code: int, expected: int, stderr: str) -> None:
    """In the middle of sampling, with a word on how to resume."""
    assert code == expected, stderr
    assert "the same command resumes" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert not list(run.path.rglob(".*.tmp"))
    with run.locked():
        assert any(run.shard_folder("pool").glob("*.parquet"))
        assert not run.pool_file(None).exists()


@SIGNALS
def test_a_signal_stops_prepare_and_the_same_command_resumes(number, code, tmp_path):
    run = new_run(tmp_path / "run")
    shards = run.shard_folder("pool")
    reached = lambda: any(shards.glob("*.parquet"))
    # The tests may run in a shell's background, which ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with when(reached, lambda: signal.raise_signal(number)):
            result = cdpo("prepare", run.path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_stopped(run, result.returncode, code, result.stderr)
    cdpo("prepare", run.path, check=0)
    assert run.state().prepared and not shards.exists()


@pytest.mark.slow
@SIGNALS
def test_a_signal_stops_a_process(number, code, tmp_path):
    """How many seconds it takes is measured by kill_many.py --interrupt."""
    run = new_run(tmp_path / "run")
    process = subprocess.Popen(
        [*CDPO, "run", str(run.path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not any(run.shard_folder("pool").glob("*.parquet")):
        time.sleep(0.005)
    os.killpg(process.pid, number)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert_stopped(run, process.returncode, code, stderr)


def test_a_full_disk_is_one_line_and_exit_one(tmp_path, largest_file):
    """A table that does not fit: the old one stays whole, no half file is left, and the same
    command works once there is room."""
    scored_frame(0, 200, 16).to_parquet(tmp_path / "s.parquet")
    out = tmp_path / "pairs.parquet"
    write_parquet(pd.DataFrame({"old": [1]}), out)
    words = ["data", "relabel", tmp_path / "s.parquet", "--reward", "r", "--lambda", "g=1"]
    largest_file(5000)
    stderr = cdpo(*words, "-o", out, check=1).stderr
    largest_file(resource.RLIM_INFINITY)
    (line,) = stderr.strip().splitlines()
    assert str(out) in line and "too large" in line and "the same command again" in line
    assert list(pd.read_parquet(out)) == ["old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.parquet", "s.parquet"]
    cdpo(*words, "-o", out, check=0)
    assert "target" in pd.read_parquet(out)


def test_a_score_cache_that_cannot_grow_says_so_and_keeps_what_it_has(tmp_path, largest_file):
    cache = ScoreCache(tmp_path / "scores.sqlite")
    keys = [np.int64(i).tobytes() * 4 for i in range(20000)]
    cache.put({keys[0]: 0.5})
    largest_file(50_000)
    with pytest.raises(OSError, match=r"scores\.sqlite"):
        cache.put(dict.fromkeys(keys, 1.0))
    largest_file(resource.RLIM_INFINITY)
    assert cache.get(keys) == {keys[0]: 0.5}
    cache.put(dict.fromkeys(keys, 1.0))
    assert len(cache.get(keys)) == len(keys)
