"""The environment: cleared or refused where the recipe decides; waiting obeys SIGTERM."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest

from constrained_dpo.environment import settle_environment
from constrained_dpo.fit.adapter import fit_adapter
from data_prep.errors import UserError
from tests.helpers.cli import cdpo

LAUNCH = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29871",
}


@pytest.fixture
def environment(monkeypatch):
    """The environment without a launcher's variables; whatever is cleared comes back."""
    mine = dict(os.environ)
    yield monkeypatch
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(mine)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_what_the_recipe_decides_is_left_aside_alone_and_refused_in_a_launch(
    environment, caplog, name, value
):
    environment.setenv(name, value)
    with caplog.at_level("INFO", "constrained_dpo"):
        settle_environment()
    assert name not in os.environ and f"{name}={value}" in caplog.text
    for key, number in (LAUNCH | {name: value}).items():
        environment.setenv(key, number)
    with pytest.raises(UserError, match=f"{name}={value} in the environment: "):
        settle_environment()
    environment.setenv(name, "1" if name.endswith("STEPS") else "no")
    settle_environment()


def test_every_command_begins_with_that(environment, tmp_path):
    environment.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    environment.setenv("WORLD_SIZE", "2")
    words = cdpo("status", tmp_path, check=2).stderr
    assert words.startswith("ACCELERATE_MIXED_PRECISION=bf16 in the environment is left aside")
    assert not {"ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"} & set(os.environ)


def test_a_fit_without_a_command_refuses_it(environment):
    environment.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    nothing = pd.DataFrame()
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION=fp16 in the environment: poli"):
        fit_adapter(None, nothing, nothing, {}, None)


@pytest.mark.parametrize(
    "name",
    ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"],
)
def test_what_another_launcher_left_is_cleared(environment, name):
    environment.delenv("LOCAL_RANK", raising=False)
    environment.setenv(name, "2")
    environment.setenv("ACCELERATE_USE_CPU", "true")
    settle_environment()
    assert name not in os.environ and os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": None}, "RANK='' in the environment is not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a number"),
        ({"RANK": "5"}, "RANK=5, WORLD_SIZE=2 in the environment: no such process"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not; unset WORLD_SIZE"),
    ],
)
def test_half_a_launch_is_refused(environment, changed, message):
    for name, value in (LAUNCH | changed).items():
        if value is None:
            environment.delenv(name, raising=False)
        else:
            environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        settle_environment()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_says_for_what_and_ends_at_a_signal(number):
    """Blocked in C, where Python's own handler does not run: in a lock that nobody opens."""
    program = (
        "import signal, torch\n"
        "from datetime import timedelta\n"
        "import constrained_dpo.environment as environment\n"
        "environment.NOTICE_AFTER = 0.1\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` ignores it
        "with environment.waiting(environment.launch_words()):\n"
        "    torch.distributed.TCPStore('127.0.0.1', 0, 2, True, timedelta(hours=1))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=os.environ | LAUNCH
    )
    assert process.stderr is not None
    words = process.stderr.readline()
    assert "waiting for the other processes of the launch (WORLD_SIZE=2 RANK=0" in words
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
