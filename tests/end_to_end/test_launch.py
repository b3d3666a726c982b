"""Two processes of `accelerate launch` on the CPU, over gloo: the same run as one process plays,
one message, and real kills."""

import json
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from constrained_dpo.fit.family import read_family
from constrained_dpo.launch import check_launch, num_processes, rank, shards_base
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord, replay
from data_prep.errors import UserError
from data_prep.models.checkpoints import resolve_device
from data_prep.models.settings import PolicySettings
from data_prep.quickstart import PROMPTS, build_policy
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.launched_fits import FITS, play
from tests.helpers.launches import (
    CDPO,
    CONFIGS,
    TINY,
    TOLERANCE,
    ended,
    last_words,
    launch,
    new_run,
    weights_differ,
)
from tests.helpers.paths import CONDITIONAL, QUICKSTART, REPO


def assert_same_round(run: RunDirectory, expected: RunDirectory) -> None:
    """Round 0 of two processes is that of one with twice the batch."""
    difference, moved = weights_differ(expected.adapter_folder(0), run.adapter_folder(0))
    assert difference < TOLERANCE * moved and moved > 1e-4
    ours, theirs = read_parquet(run.samples_file(0)), read_parquet(expected.samples_file(0))
    for column in ("response_id", "response"):
        assert ours[column].equals(theirs[column])
    np.testing.assert_allclose(ours["policy_logp"], theirs["policy_logp"], atol=1e-5)
    lambda_ = expected.state().lambda_[1]
    # u weighs π_ref's answers by log-probabilities, which are rounded by the batch they are in
    assert run.state().lambda_[1] == pytest.approx(lambda_, abs=1e-7)
    assert replay(run) == run.state().lambda_
    assert not list(run.path.rglob(".*.tmp")) and not list(run.path.rglob("shards/*/*"))


def assert_same_tables(run: RunDirectory, expected: RunDirectory) -> None:
    """What precedes the fit, to the last bit."""
    files = [run.prompts_file, run.pool_file(None), run.reference_file, run.pairs_file(0)]
    for file in [*files, *run.path.glob("exact.json")]:
        other = expected.path / file.relative_to(run.path)
        assert file.read_bytes() == other.read_bytes(), file


@pytest.mark.slow
def test_a_round_of_two_processes_is_that_of_one_with_twice_the_batch(tmp_path_factory):
    """Prepared, fitted and judged by two; they speak with one voice."""
    model = f"policy.model={build_policy()}"
    one, two = (new_run(tmp_path_factory, size, model) for size in (8, 4))
    launched = launch(*CDPO, "round", two.path, "--json")
    cdpo("round", one.path, check=0)
    out, err = ended(launched, 0)
    assert json.loads(out.splitlines()[-1])["processes"] == 2 and out.count('"processes"') == 1
    assert err.count("round 0: fit ...") == 1
    assert_same_tables(two, one)
    assert_same_round(two, one)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    run = new_run(tmp_path_factory, 8)
    cdpo("round", run.path, check=0)
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of two processes, of which the second was killed by kill -9 inside the first fit; and
    what the launch said."""
    run = new_run(tmp_path_factory, 4)
    launched = launch(*CDPO, "run", run.path)
    while launched.poll() is None and not (run.round_folder(0) / ".adapter.tmp").exists():
        time.sleep(0.005)
    victim = next(
        p for p in psutil.Process(launched.pid).children() if p.environ().get("RANK") == "1"
    )
    victim.send_signal(signal.SIGKILL)
    _, err = ended(launched, 1)
    return run, err


@pytest.fixture(scope="module")
def resumed(killed, tmp_path_factory):
    """The same run after two processes resumed its round; the fits they did before that; stdout and
    stderr."""
    run = RunDirectory(shutil.copytree(killed[0].path, tmp_path_factory.mktemp("resumed") / "run"))
    fits = tmp_path_factory.mktemp("fits")
    script = REPO / "tests" / "helpers" / "launched_fits.py"
    out, err = ended(launch(script, fits, 2, "round", run.path, "--json"), 0)
    return run, fits, out, err


@pytest.mark.slow
def test_a_kill_ends_the_launch_with_one_message_and_nothing_half_done(killed, one_process):
    run, err = killed
    assert len(last_words(err)) == 1 and "the same command" in last_words(err)[0], err
    assert not run.adapter_folder(0).exists()
    with run.locked():
        assert not list(run.path.rglob(".*.tmp"))
    assert run.exact_file.exists()
    assert_same_tables(run, one_process)


@pytest.mark.slow
def test_two_processes_resume_a_round_to_the_same_results(resumed, one_process):
    run, _, out, err = resumed
    assert json.loads(out.splitlines()[-1])["processes"] == 2 and out.count('"processes"') == 1
    assert err.count("round 0: fit ...") == 1 and "prepare" not in err
    assert_same_round(run, one_process)


@pytest.mark.slow
def test_fits_of_two_processes_are_those_of_one_with_twice_the_batch(resumed, tmp_path):
    """Pairs and groups, nf4 and unquantized, warm start, accumulation and checkpointing, DDP and
    FSDP; the KL's anchor is checked in every process."""
    play(tmp_path, 4)
    _, fits, out, _ = resumed
    assert sorted(p.name for p in fits.iterdir()) == sorted(FITS)
    for name, kind in (("listwise", "Parameters"), ("sharded", "DTensors")):
        assert f"{name}: the base is made of {kind}" in out
    for name in FITS:
        difference, moved = weights_differ(tmp_path / name, fits / name)
        assert difference < TOLERANCE * moved and moved > 1e-2, (name, difference, moved)
        error = json.loads((fits / name / "training_log.json").read_text())["anchor_error"]
        assert error is None if name.endswith("warm") else error < 1e-4


@pytest.mark.slow
def test_one_process_resumes_what_two_began(killed, tmp_path):
    run = RunDirectory(shutil.copytree(killed[0].path, tmp_path / "run"))
    cdpo("round", run.path, check=0)
    assert run.rounds_done() == 1 and RoundRecord.read(run.round_file(0)).processes == 1
    assert replay(run) == run.state().lambda_


SCORER = """
import os
from data_prep.quickstart import harmless


def score(prompts, responses):
    if os.environ.get("RANK") == "1":
        raise ValueError("no model here")
    return harmless(prompts, responses)
"""


@pytest.mark.slow
def test_a_family_by_category_is_distilled_by_one_of_two_processes(tmp_path):
    for split in ("train", "test"):
        rows = [{"prompt": p, "kind": p.split()[1]} for p in PROMPTS[split]]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        f"prompts.source={tmp_path}/train.jsonl",
        f"prompts.test={tmp_path}/test.jsonl",
        "objective.constraints.harmless.by=kind",
        "objective.constraints.harmless.min_prompts=2",
        *CONDITIONAL,
        "fit.conditional={distill_steps: 5}",
    ]
    run = init_run(QUICKSTART, tmp_path / "run", changes)
    ended(launch(*CDPO, "run", run.path, "--rounds", "2"), 0)
    records = [RoundRecord.read(run.round_file(number)) for number in (0, 1)]
    assert all(record.processes == 2 and record.trials for record in records)
    # the base came back from round 0 as it was
    samples = read_parquet(run.samples_file(1))
    learner = LoraLearner(run.recipe(), read_parquet(run.prompts_file), None)
    expected = learner.log_probabilities(samples, None)
    np.testing.assert_allclose(samples["ref_logp"], expected, atol=1e-4)
    assert read_family(run.family_folder(1)).num_blocks == 2 < len(run.recipe().problem.names)
    assert replay(run) == run.state().lambda_
    assert not list(run.path.rglob(".*.tmp")) and not list(run.path.rglob(".adapter*"))


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_one_message(tmp_path):
    (tmp_path / "scorer.py").write_text(SCORER)
    target = f"objective.constraints.harmless.scorer.target={tmp_path / 'scorer.py'}:score"
    run = init_run(QUICKSTART, tmp_path / "run", [*TINY, target])
    out, err = ended(launch(*CDPO, "prepare", run.path), 1)
    words = last_words(err)
    assert len(words) == 1 and words[0].endswith("raised ValueError: no model here") and not out
    with run.locked():
        assert not run.pool_file(None).exists()
    cdpo("prepare", run.path, check=0)
    assert run.state().prepared


def test_what_a_launch_cannot_fit_is_refused(monkeypatch):
    """In this process, under a launch's variables."""
    assert (num_processes(), rank(), shards_base()) == (1, 0, False)
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    for key, value in (variables | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(key, value)
    assert (num_processes(), rank(), shards_base()) == (2, 1, True)
    with pytest.raises(UserError, match=r"nf4 is not sharded.*ddp\.yaml"):
        check_launch(PolicySettings(model="quickstart"))
    with pytest.raises(UserError, match="shards on GPUs only"):
        check_launch(PolicySettings(model="quickstart", quantization="none"))


def test_every_process_takes_the_gpu_of_its_number(monkeypatch):
    """By the launcher's variables alone: there is no GPU here, so nothing is placed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto", "k") == resolve_device("cuda", "k") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto", "k") == "cuda:3" and resolve_device("cpu", "k") == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_device("auto", "k") == "cpu"


def test_every_config_is_read_by_accelerate_and_says_whether_it_was_run():
    files = sorted(CONFIGS.glob("*.yaml"))
    named = {"ddp.yaml", "ddp_cpu.yaml", "fsdp.yaml", "zero2.yaml", "zero3.yaml"}
    assert {f.name for f in files} >= named
    for file in files:
        load_config_from_file(str(file))
        # no autocast: a fit sees what the dual step measures
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"
        assert ("not run" in file.read_text()) == (file.name != "ddp_cpu.yaml"), file.name
