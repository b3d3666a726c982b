"""Ctrl-C, SIGTERM and a full disk: one clear line, the exit code that says which, and nothing lost.
`kill_many.py` does it at scale."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.run.create import init_run
from data_prep.scorers.cache import ScoreCache
from data_prep.tables import write_parquet
from tests.helpers.cli import CDPO
from tests.helpers.paths import QUICKSTART, SMALL
from tests.helpers.tables import scored_frame


@pytest.fixture
def largest_file():
    """Sets the largest file this process may write, in bytes: a write beyond it fails as on a full
    disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_prepare_and_says_how_to_resume(number, code, tmp_path):
    run = init_run(QUICKSTART, tmp_path / "run", list(SMALL))
    process = subprocess.Popen(
        [*CDPO, "run", str(run.path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # the tests may run in a shell's background, which ignores it
    )
    while process.poll() is None and not any(run.shard_folder("pool").glob("*.parquet")):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    try:
        _, stderr = process.communicate(
            timeout=60
        )  # how many seconds it takes is measured by kill_many.py --interrupt
    finally:
        process.kill()
    assert process.returncode == code
    assert "the same command resumes" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert not list(run.path.rglob(".*.tmp"))
    with run.locked():
        assert any(run.shard_folder("pool").glob("*.parquet"))


def test_a_full_disk_is_one_line_and_exit_one(tmp_path):
    """A table that does not fit: the old one stays whole, no half file is left, and the same
    command works once there is room."""
    scored_frame(0, 200, 16).to_parquet(tmp_path / "s.parquet")
    out = tmp_path / "pairs.parquet"
    arguments = [
        "data",
        "relabel",
        str(tmp_path / "s.parquet"),
        "--reward",
        "r",
        "--lambda",
        "g=1",
        "-o",
        str(out),
    ]
    write_parquet(pd.DataFrame({"old": [1]}), out)
    limited = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\nimport "
        f"sys\nsys.argv = ['cdpo', *{arguments!r}]\n"
    )
    code = limited + "from constrained_dpo.cli.main import main\nmain()"
    result = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert str(out) in lines[0] and "too large" in lines[0] and "the same command again" in lines[0]
    assert list(pd.read_parquet(out)) == ["old"] and sorted(p.name for p in tmp_path.iterdir()) == [
        "pairs.parquet",
        "s.parquet",
    ]
    subprocess.run([*CDPO, *arguments], check=True, stdout=subprocess.DEVNULL)
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
