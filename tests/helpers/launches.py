"""`accelerate launch` of two processes on the CPU, and runs for them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from tests.helpers.paths import QUICKSTART, REPO

CONFIGS = REPO / "recipes" / "accelerate"
CDPO = ("-m", "constrained_dpo.cli")
TINY = [
    "prompts.max_fit=8",
    "prompts.max_test=4",
    "sampling.responses_per_prompt=8",
    "dual.responses_per_prompt=8",
    "sampling.batch_size=16",
    "fit.steps=12",
    "dual.rounds=2",
    "policy.lora.dropout=0",
    "fit.pairs_per_prompt=12",
]
TOLERANCE = 1e-2
"""Of adapter weights, as a share of the largest: a sum over two processes is rounded in another
order, which Adam enlarges where a gradient is nearly 0. Measured: 4e-5 to 2.3e-3; one process with
half the batch is off by 1."""


def launch(*arguments, config: str = "ddp_cpu.yaml") -> subprocess.Popen:
    """`accelerate launch` with a shipped config; stdout and stderr are pipes."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / config,
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPO,
    )


def ended(launched: subprocess.Popen, code: int) -> tuple[str, str]:
    """stdout and stderr of a launch that ends by itself, with all of its processes."""
    workers = psutil.Process(launched.pid).children(recursive=True)
    try:
        out, err = launched.communicate(timeout=200)
    finally:
        launched.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert launched.returncode == code, err
    assert not alive
    return out, err


def last_words(stderr: str) -> list[str]:
    """What the command itself said at the end, without phases and the launcher's report."""
    return [
        line
        for line in stderr.splitlines()
        if line.startswith(("error: ", "stopped")) or ("Traceback" in line and "rank" in line)
    ]


def weights_differ(one: Path, two: Path) -> tuple[float, float]:
    """The largest difference of two adapters' weights, and how far the first is from its start
    (lora_B is 0 there)."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    moved = max(np.abs(value).max() for name, value in first.items() if "lora_B" in name)
    return max(np.abs(first[name] - second[name]).max() for name in first), moved


def new_run(tmp_path_factory, batch_size: int, *overrides: str) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    return init_run(QUICKSTART, folder / "run", [*TINY, f"fit.batch_size={batch_size}", *overrides])
