"""The wheel, installed into an environment of its own, holds all that the commands need."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.paths import REPO

PACKAGES = ("constrained_dpo/*", "data_prep/*")

SCORES = """prompt_id,helpful,harmless
a,1.0,-0.5
a,0.0,0.5
b,0.8,-0.2
b,0.1,0.9
"""

TEMPLATES = """
from importlib.resources import files
import constrained_dpo, data_prep
for package, name in (
    (constrained_dpo, "py.typed"),
    (data_prep, "py.typed"),
    (constrained_dpo, "report/templates/report.html.j2"),
    (constrained_dpo, "evaluation/templates/model_card.md"),
):
    assert files(package).joinpath(name).is_file(), name
print(constrained_dpo.__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """The folder of executables of an environment with the wheel; the libraries are this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "pyproject.toml", "README.md", "LICENSE", *PACKAGES],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    for name in tracked.stdout.decode().split("\0")[:-1]:
        copied = source / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes((REPO / name).read_bytes())
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", str(wheel)], check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # a path in a .pth file gives its packages, not those that its own .pth files name: this
    # environment's editable install stays outside
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv/bin"


def run(*command: str | Path, cwd: Path) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_its_templates_and_its_commands_run(environment, tmp_path):
    where = run(environment / "python", "-c", TEMPLATES, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment.parent)
    assert "relabel" in run(environment / "data-prep", "--help", cwd=tmp_path)
    assert "dual" in run(environment / "cdpo", "--help", cwd=tmp_path)
    (tmp_path / "scores.csv").write_text(SCORES)
    options = ("--reward", "helpful", "--constraint", "harmless=0.1", "--beta", "1")
    printed = run(environment / "cdpo", "dual", "solve", "scores.csv", *options, cwd=tmp_path)
    assert "λ*" in printed and "harmless" in printed
