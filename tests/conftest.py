"""Shared parts of the tests: everything runs offline and on two cores; real models are built once
per session."""

import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the commands set it
# `make test` has two workers for two cores; the processes that tests start count too
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads spin, and the tests' matrices are small

from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from data_prep.quiet import quiet_libraries
from tests.helpers.paths import CONDITIONAL, QUICKSTART, SMALL

quiet_libraries()  # as the commands do, before a library is loaded


def pytest_collection_finish():
    """What the test modules imported is never garbage: each fit ends with a full collection, which
    takes a third of a second where it visits the libraries' objects too."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _threads():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def quickstart_policy():
    """The embedded world's π_ref, nf4, as the recipe loads it."""
    from data_prep.models.policy import load_policy
    from data_prep.models.settings import PolicySettings

    return load_policy(PolicySettings(model="quickstart", dtype="float32"))


def played_once(tmp_path_factory, name: str, overrides: tuple[str, ...]) -> RunDirectory:
    """A run of the embedded world, played by the CLI, its words in files beside the run; read-only
    for tests, one for all workers."""
    from tests.helpers.cli import cdpo

    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            playing = Path(tempfile.mkdtemp(dir=folder.parent))
            run = init_run(QUICKSTART, playing / "run", list(overrides))
            result = cdpo("run", run.path, "--json", check=0)
            (playing / "stdout").write_text(result.stdout)
            (playing / "stderr").write_text(result.stderr)
            playing.rename(folder)
    return RunDirectory(folder / "run")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Two plain rounds."""
    return played_once(tmp_path_factory, "small", SMALL)


@pytest.fixture(scope="session")
def conditional_run(tmp_path_factory):
    """Two rounds of a family, each in two stretches, solved by trials."""
    return played_once(tmp_path_factory, "conditional", CONDITIONAL)


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory) -> RunDirectory:
    """A copy of `small_run` to write into."""
    path = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(small_run.path, path)
    return RunDirectory(path)


@pytest.fixture
def refused():
    """Asserts that a command is refused in one clear line; returns the line."""
    from tests.helpers.cli import cdpo

    def run(*arguments, match: str) -> str:
        stderr = cdpo(*arguments, check=2).stderr
        lines = [
            line
            for line in stderr.strip().splitlines()
            if not line.startswith(("new:", "prepare:", "round "))
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
