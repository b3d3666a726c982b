"""Shared parts of the tests: everything runs offline and on two cores; real models are built once
per session."""

import os
import shutil
import subprocess
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the commands set it
# `make test` has two workers for two cores; the processes that tests start count too
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory

REPO = Path(__file__).resolve().parents[1]
RECIPES = REPO / "recipes"
QUICKSTART = REPO / "tests" / "data" / "quickstart_pairs.yaml"
REAL = (
    REPO.parent / "shared" / "real" / "hh-mini"
)  # not part of the project: tests that need it skip without it


@pytest.fixture(autouse=True, scope="session")
def _threads():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def random_world(
    seed: int,
    num_constraints: int = 1,
    prompts: int = 12,
    responses: int = 200,
    beta: float = 0.5,
    margin: float = 0.4,
) -> TabularWorld:
    """An enumerated world with tension: every utility is negatively correlated with the reward."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(prompts, responses)) * 1.5
    ref_logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    reward = rng.normal(size=(prompts, responses))
    names = [f"g{i}" for i in range(num_constraints)]
    utilities = {n: -0.6 * reward + 0.8 * rng.normal(size=reward.shape) for n in names}
    problem = ConstrainedProblem("r", beta, tuple(Constraint(n, margin=margin) for n in names))
    return TabularWorld(problem, ref_logp, reward, utilities)


@pytest.fixture(scope="session")
def quickstart_policy():
    """The embedded world's π_ref, nf4, as the recipe loads it."""
    from data_prep.models.policy import load_policy
    from data_prep.models.settings import PolicySettings

    return load_policy(PolicySettings(model="quickstart", dtype="float32"))


# A real run that takes seconds a round.
SMALL = (
    "prompts.max_fit=24",
    "prompts.max_test=12",
    "sampling.responses_per_prompt=8",
    "dual.responses_per_prompt=8",
)
SMALL += ("sampling.batch_size=64", "fit.steps=30", "dual.rounds=2")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Two rounds of the embedded world, played by the CLI in a process of its own; read-only for
    tests, one for all workers."""
    from test_cli import CDPO

    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "small"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            playing = Path(tempfile.mkdtemp(dir=folder.parent))
            run = init_run(QUICKSTART, playing / "run", list(SMALL))
            subprocess.run([*CDPO, "run", str(run.path)], check=True, stdout=subprocess.DEVNULL)
            playing.rename(folder)
    return RunDirectory(folder / "run")


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory) -> RunDirectory:
    """A copy of `small_run` to write into."""
    path = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(small_run.path, path)
    return RunDirectory(path)


def scored_frame(
    seed: int, prompts: int, responses: int, names: tuple[str, ...] = ("r", "g")
) -> pd.DataFrame:
    """A small scored responses table (ids and scores only)."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(prompts), responses)
    frame = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in ids], "response_id": [f"y{i}" for i in range(len(ids))]}
    )
    return frame.assign(**{n: rng.normal(size=len(ids)) for n in names})


@pytest.fixture
def refused():
    """Asserts that a command is refused in one clear line; returns the line."""
    from test_cli import cdpo

    def run(*arguments, match: str) -> str:
        stderr = cdpo(*arguments, check=2).stderr
        lines = [
            line
            for line in stderr.strip().splitlines()
            if not line.startswith(("prepare:", "round "))
        ]
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: ") and match in lines[0] and "Traceback" not in stderr, (
            lines[0]
        )
        return lines[0]

    return run


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.parquet"
    pd.DataFrame(
        {
            "prompt_id": list("abc"),
            "response_id": list("xyz"),
            "prompt": "q",
            "response": ["1", "2", "3"],
        }
    ).to_parquet(path)
    return path
