"""Bad run directories, kind by kind, through the command line: one clear line, nothing lost."""

import json
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.readers.tables import write_parquet
from tests.helpers.broken import cut
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART

SCORER = (
    "def good(p, r): return [float(len(x)) for x in r]\ndef kind(p, r): return "
    "[float(x.count('e')) for x in r]\n"
)


REQUESTS = [
    f"{who} open {what}"
    for who in ("kid", "boss", "pirate")
    for what in ("safe", "dog", "door", "car")
]


def write_recipe(folder, base) -> None:
    """A recipe of a user: local model, prompts and scorer files."""
    lines = [json.dumps({"prompt": request}) for request in REQUESTS]
    (folder / "p.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "s.py").write_text(SCORER)
    scorer = lambda name: {"type": "python", "target": f"s.py:{name}"}
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw["policy"]["model"] = str(base)
    raw["prompts"] = {"source": "p.jsonl", "test": 0.4}
    raw["sampling"]["responses_per_prompt"] = 4
    raw["objective"]["reward"] = {"name": "good", "scorer": scorer("good")}
    raw["objective"]["constraints"] = [{"name": "kind", "margin": 0.1, "scorer": scorer("kind")}]
    raw["dual"] |= {"responses_per_prompt": 4, "rounds": 2, "prompts_per_round": 4}
    raw["fit"] |= {"steps": 2, "pairs_per_prompt": 2, "batch_size": 4, "warmup_steps": 0}
    (folder / "r.yaml").write_text(yaml.safe_dump(raw))


@pytest.fixture(scope="module")
def played(tmp_path_factory, base):
    """A run folder beside its inputs, one round of two played; tests copy it."""
    folder = tmp_path_factory.mktemp("played")
    write_recipe(folder, base)
    for words in (["init", folder / "r.yaml", folder / "run"], ["round", folder / "run"]):
        cdpo(*words, check=0)
    return folder


def edit(name: str, change):
    """A change of a JSON file of the run."""

    def apply(run) -> None:
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(content))

    return apply


def write(name: str, text: str):
    return lambda run: (run / name).write_text(text)


def scores_of(run, name: str, column: str, values: object) -> None:
    write_parquet(pd.read_parquet(run / name).assign(**{column: values}), run / name)


RUNS = {
    "state.json is no JSON": (write("state.json", '{"version": 1,'), "status", "state.json"),
    "state.json is a list": (write("state.json", "[]"), "status", "state.json"),
    "state.json empty": (write("state.json", ""), "status", "state.json"),
    "state.json without lambda": (
        edit("state.json", lambda s: s.pop("lambda")),
        "status",
        "state.json",
    ),
    "an older version": (
        edit("state.json", lambda s: s.update(version=0)),
        "status",
        "version 0, this program reads 1",
    ),
    "a newer version": (
        edit("state.json", lambda s: s.update(version=2)),
        "round",
        "version 2, this program reads 1",
    ),
    "recipe edited": (
        lambda run: (run / "recipe.yaml").write_text(
            (run / "recipe.yaml").read_text().replace("beta: 0.25", "beta: 0.5")
        ),
        "round",
        "was changed after init",
    ),
    "recipe gone": (lambda run: (run / "recipe.yaml").unlink(), "round", "no such recipe file"),
    "round.json is no JSON": (write("rounds/000/round.json", "{"), "status", "round.json"),
    "round.json gone": (
        lambda run: (run / "rounds/000/round.json").unlink(),
        "status",
        "round.json",
    ),
    "history that is not the tables'": (
        edit("state.json", lambda s: s["lambda"][1].update(kind=7.0)),
        "check",
        "λ of round 1",
    ),
    "negative lambda in the history": (
        edit("state.json", lambda s: s["lambda"][1].update(kind=-1.0)),
        "round",
        "kind is -1",
    ),
    "samples truncated": (
        cut("rounds/000/samples.parquet"),
        "check",
        "not a readable parquet file",
    ),
    "pool truncated": (cut("pool/reference.parquet"), "round", "not a readable parquet file"),
    "reference gone": (
        lambda run: (run / "reference.parquet").unlink(),
        "check",
        "reference.parquet: no such file",
    ),
    "prompts gone": (
        lambda run: (run / "prompts.parquet").unlink(),
        "round",
        "prompts.parquet: no such file",
    ),
    "NaN in the samples": (
        lambda run: scores_of(run, "rounds/000/samples.parquet", "kind", np.nan),
        "check",
        "not a finite number",
    ),
    "prompts changed": (
        lambda run: scores_of(run, "prompts.parquet", "prompt", "x"),
        "round",
        "prompts changed since",
    ),
    "scorer changed": (
        lambda run: (run.parent / "s.py").write_text(SCORER + "# other\n"),
        "round",
        "changed since `prepare`",
    ),
    "scorer gone": (lambda run: (run.parent / "s.py").unlink(), "round", "s.py"),
    "adapter gone": (
        lambda run: shutil.rmtree(run / "rounds/000/adapter"),
        "round",
        "rounds/000/adapter",
    ),
    "adapter truncated": (
        cut("rounds/000/adapter/adapter_model.safetensors"),
        "round",
        "rounds/000/adapter",
    ),
    "score cache overwritten": (
        write("scores.sqlite", "not a database" * 100),
        "round",
        "scores.sqlite",
    ),
    "a folder of something else": (
        lambda run: (run / "state.json").unlink(),
        "status",
        "not a run directory",
    ),
}


def copied(played, tmp_path):
    """The played run and its inputs at another place, the recipe's paths led there."""
    folder = shutil.copytree(played, tmp_path / "copy")
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(played), str(folder)))
    run = RunDirectory(folder / "run")
    led = {"recipe_hash": load_recipe(recipe).hash()}
    run.write_state(run.state().model_copy(update=led))
    return folder


def contents(run) -> dict:
    files = [f for f in run.rglob("*") if f.is_file() and f.name not in (".lock", ".holder")]
    return {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", RUNS)
def test_run_directory(kind, refused, played, tmp_path):
    breaking, command, match = RUNS[kind]
    run = copied(played, tmp_path) / "run"
    breaking(run)
    before = contents(run)
    refused(command, run, match=match)
    after = contents(run)
    assert before == {file: after.get(file) for file in before}, "something was lost"


def test_an_adapter_of_another_base_in_a_run(refused, played, foreign_adapter, tmp_path):
    run = copied(played, tmp_path) / "run"
    shutil.rmtree(run / "rounds/000/adapter")
    shutil.copytree(foreign_adapter, run / "rounds/000/adapter")
    refused("round", run, match="another base")


def test_a_run_of_another_recipe_and_a_folder_of_something_else(refused, played, tmp_path):
    refused("init", QUICKSTART, played / "run", match="is a run of another recipe")
    refused(
        "init", played / "r.yaml", played / "run", "-s", "fit.steps=3", match="other -s settings"
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    refused("init", played / "r.yaml", tmp_path / "photos", match="is not a run directory")


def test_a_run_folder_that_cannot_be_written(refused, played, tmp_path):
    (tmp_path / "file").write_text("")
    refused("init", played / "r.yaml", tmp_path / "file" / "run", match="cannot be written")
    refused("init", played / "r.yaml", tmp_path / "file", match="cannot be written")
    run = copied(played, tmp_path) / "run"
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "copy"], capture_output=True
        ).returncode
        == 0
    )
    if not mounted and os.geteuid() == 0:
        pytest.skip("root ignores permission bits and may not mount here")
    try:
        if mounted:
            refused("init", played / "r.yaml", run, match="cannot be written")
        else:
            run.chmod(0o555)
            refused("round", run, match="cannot be written")
    finally:
        if mounted:
            subprocess.run(["umount", tmp_path / "copy"], check=True)
        else:
            run.chmod(0o755)


def test_prompts_longer_than_max_length_and_scores_that_never_vary(refused, base, tmp_path):
    write_recipe(tmp_path, base)
    refused(
        "check",
        tmp_path / "r.yaml",
        "-s",
        "fit.max_length=5",
        match="are longer than fit.max_length 5",
    )
    (tmp_path / "s.py").write_text(SCORER.replace("float(x.count('e'))", "1.5"))
    cdpo("init", tmp_path / "r.yaml", tmp_path / "run", check=0)
    refused("prepare", tmp_path / "run", match="scorer of kind: gives 1.5 to all")
    assert not RunDirectory(tmp_path / "run").state().prepared


def test_a_gpu_that_is_not_there(refused, base, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_recipe(tmp_path, base)
    cdpo("init", tmp_path / "r.yaml", tmp_path / "run", "-s", "policy.device=cuda", check=0)
    refused(
        "prepare", tmp_path / "run", match="policy.device: cuda was asked for but torch sees no GPU"
    )


def test_a_run_that_another_process_holds(refused, base, tmp_path):
    write_recipe(tmp_path, base)
    cdpo("init", tmp_path / "r.yaml", tmp_path / "run", check=0)
    with RunDirectory(tmp_path / "run").locked():
        refused("round", tmp_path / "run", match=f"is being worked on by process {os.getpid()}")
