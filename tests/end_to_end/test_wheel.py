"""The wheel, installed into an environment of its own, holds all that the commands need."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import REPO, SMALL

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

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


SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"

pytestmark = pytest.mark.slow


def tracked() -> list[str]:
    """What the distribution is made of, by git; the folder of recipes is linked into a package."""
    names = ("pyproject.toml", "README.md", "LICENSE", "recipes/*", *PACKAGES)
    listed = subprocess.run(
        ["git", "ls-files", "-z", *names], cwd=REPO, capture_output=True, check=True
    )
    return listed.stdout.decode().split("\0")[:-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, made of the source distribution, which is made of what git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in tracked():
        copied = source / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).is_symlink():
            copied.symlink_to(os.readlink(REPO / name))
        else:
            copied.write_bytes((REPO / name).read_bytes())
    command = [sys.executable, "-c", SDIST, str(folder)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    sdist = folder / built.stdout.splitlines()[-1]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, "wheel", *options, str(sdist)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel) -> Path:
    """The folder of executables of an environment with the wheel; the libraries are this one's."""
    folder = wheel.parent
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    run(*PIP, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # a path in a .pth file gives its packages, not those that its own .pth files name: this
    # environment's editable install stays outside
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv/bin"


def test_the_wheel_holds_what_git_tracks_and_nothing_else(wheel):
    linked = {n for n in tracked() if (REPO / n).is_symlink()}
    packages = {n for n in tracked() if n.startswith(("constrained_dpo/", "data_prep/"))} - linked
    recipes = {f"constrained_dpo/{n}" for n in tracked() if n.startswith("recipes/")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if ".dist-info/" not in n} == packages | recipes
    assert linked == {"constrained_dpo/recipes"} and "data_prep/everyday/train.jsonl" in names


def test_a_newcomer_plays_the_embedded_world_from_the_wheel(environment, tmp_path):
    """The README's commands without a clone, with fewer steps."""
    run(environment / "cdpo", "new", "quickstart.yaml", "--copy", "quickstart", cwd=tmp_path)
    small = [word for key in SMALL for word in ("-s", key)]
    less = ("-s", "fit.refresh=1", "-s", "fit.batch_size=4", "-s", "dual.trials=2")
    run(environment / "cdpo", "init", "quickstart.yaml", "mine", *small, *less, cwd=tmp_path)
    assert "verdict" in run(environment / "cdpo", "round", "mine", cwd=tmp_path)


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
