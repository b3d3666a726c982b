"""Fits of real runs, killed by kill -9 again and again."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from constrained_dpo.fit.checkpoints import SEAL
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from data_prep.quickstart import build_policy
from tests.helpers.paths import QUICKSTART, SMALL
from tests.helpers.wrecks import Server, alive, content, leftovers

pytestmark = pytest.mark.slow

# Dropout 0.05 is the recipe's; the steps span several epochs.
LONG = (
    *SMALL,
    "fit.steps=40",
    "fit.later_rounds=0.5",
    "fit.save_steps=4",
    "fit.gradient_accumulation=2",
    "fit.batch_size=8",
    "fit.pairs_per_prompt=6",
    "fit.holdout=0.2",
    "fit.early_stop=50",
    "fit.eval_steps=7",
    "fit.learning_rate=2e-3",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def play(server: Server, run: RunDirectory, moment=None, delay: float = 0.0) -> tuple[bool, str]:
    """`cdpo run` in a process of its own, killed with its group `delay` seconds after `moment()` is
    true; returns whether it was killed, and what it wrote."""
    pid = server.start("run", run.path)
    while alive(pid):
        if moment and moment():
            time.sleep(delay)
            if alive(pid):
                os.killpg(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    status = server.wait()
    assert status in (0, -signal.SIGKILL), server.log.read_text()
    return status != 0, server.log.read_text()


def checkpoints(run: RunDirectory, number: int) -> dict[int, bool]:
    """Step → whether it is sealed."""
    folders = run.checkpoints_folder(number).glob("checkpoint-*")
    return {int(path.name.rpartition("-")[2]): (path / SEAL).exists() for path in sorted(folders)}


def whole(run: RunDirectory, number: int) -> list[int]:
    return sorted(step for step, sealed in checkpoints(run, number).items() if sealed)


def newest(run: RunDirectory, number: int) -> int:
    return max(whole(run, number), default=0)


def logged(run: RunDirectory, number: int) -> list[dict]:
    """The log of a fit without its times; its last row is about the process that ended it."""
    log = json.loads((run.adapter_folder(number) / "training_log.json").read_text())["log"]
    clock = ("_runtime", "_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(clock)} for row in log[:-1]]


def lose_the_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", 1000)


def test_fits_killed_many_times_equal_those_never_killed(server, tmp_path):
    """To the last bit: adapters, tables, λ, the log of every step; with accumulation, dropout,
    epochs, an early stop's best adapter.

    A checkpoint that a kill left half-written, or that was damaged since, gives way to the one
    before it.
    """
    model = f"policy.model={build_policy()}"
    expected, run = (
        init_run(QUICKSTART, tmp_path / name, [*LONG, model])
        for name in ("uninterrupted", "killed")
    )
    killed, words = play(server, expected)
    assert not killed and "goes on" not in words
    half_written = lambda: newest(run, 0) >= 16 and False in checkpoints(run, 0).values()
    two_whole = lambda: list(checkpoints(run, 0).values()) == [True, True]
    # The round that is killed, when, how many seconds later, and what is done to its newest
    # checkpoint.
    chain = [
        (0, two_whole, 0.0, truncate),
        (0, half_written, 0.0, None),
        (0, lambda: newest(run, 0) >= 24 and two_whole(), 0.0, lose_the_seal),
        (0, lambda: newest(run, 0) >= 32, 0.05, None),
        (1, lambda: newest(run, 1) >= 8, 0.02, None),
        (1, None, 0.0, None),
    ]
    start = 0
    for number, moment, delay, damage in chain:
        killed, words = play(server, run, moment, delay)
        assert killed == (moment is not None)
        line = f"fit: goes on from checkpoint-{start}\n"
        assert (line in words) if start else ("goes on from" not in words), words
        steps = whole(run, number)
        if damage:
            damage(run.checkpoints_folder(number) / f"checkpoint-{steps.pop()}")
        start = steps[-1] if steps else 0
    results, uninterrupted = content(run), content(expected)
    names = results.keys() | uninterrupted.keys()
    assert [name for name in names if results.get(name) != uninterrupted.get(name)] == []
    assert [max(row["step"] for row in logged(run, number)) for number in range(2)] == [40, 20]
    assert all(logged(run, number) == logged(expected, number) for number in range(2))
    assert logged(run, 0)[-1]["epoch"] > 2
    assert leftovers(run) == []
