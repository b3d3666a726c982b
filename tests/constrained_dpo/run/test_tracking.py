"""report_to: what tensorboard and wandb are told of a small real run; a tracker that is not
installed is refused before any sampling."""

import importlib.util
import json
import shutil

import pytest

from constrained_dpo.check.check import check_recipe
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.tracking import require_trackers
from data_prep.errors import UserError
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, SMALL
from tests.helpers.records import measurement, round_record

STEPS = 4


def played(path, trackers) -> RunDirectory:
    few = ["prompts.max_fit=2", "prompts.max_test=2", "dual.prompts_per_round=2", "dual.rounds=1"]
    few += [f"fit.steps={STEPS}", "fit.warmup_steps=1", "fit.batch_size=8"]
    few += ["policy.quantization=none", "dual.init=zeros"]
    settings = [*SMALL, *few, f"fit.report_to=[{trackers}]"]
    cdpo("init", QUICKSTART, path, *[word for s in settings for word in ("-s", s)], check=0)
    cdpo("round", path, check=0)
    return RunDirectory(path)


def scalars(folder) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_reads_the_loss_curve_and_the_rounds_also_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    run = played(tmp_path / "run", "tensorboard")
    state = run.state()
    losses = scalars(run.logs_folder("round-000"))["train/loss"]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    log = json.loads((run.adapter_folder(0) / "training_log.json").read_text())["log"]
    assert [v for _, v in losses] == pytest.approx([row["loss"] for row in log if "loss" in row])

    # killed after round 0's fit was lost, with its logs half-written
    run.write_state(state.model_copy(update={"lambda_": state.lambda_[:1]}))
    shutil.rmtree(run.round_folder(0))
    (run.logs_folder("round-000") / "events.out.tfevents.half").write_bytes(b"\x00\x01")
    cdpo("round", run.path, check=0)
    assert run.state().lambda_ == state.lambda_
    assert scalars(run.logs_folder("round-000"))["train/loss"] == losses
    told, record = scalars(run.logs_folder("rounds")), RoundRecord.read(run.round_file(0))
    tags = {"lambda/harmless", "u/harmless/dual", "u/harmless/test", "kl/dual"}
    assert tags <= set(told) == set(record.scalars())
    for tag, points in told.items():
        assert {step for step, _ in points} == {0}
        value = record.scalars()[tag]
        assert [v for _, v in points] == pytest.approx([value] * len(points))


def test_wandb_runs_offline_in_the_run_directory(tmp_path):
    pytest.importorskip("wandb")
    run = played(tmp_path / "run", "wandb")
    for name in ("round-000", "rounds"):
        assert list(run.logs_folder(name).glob("wandb/offline-run-*/*.wandb"))


def test_estimates_that_are_null_are_not_points():
    missing = {"kl": None, "objective": None}
    test = measurement(-0.1, **missing).to_json()
    assert round_record(0, 0.1, test=test, **missing).scalars() == {
        "lambda/g": 0.5,
        "u/g/dual": 0.1,
        "u/g/test": -0.1,
        "reward/dual": 1.0,
        "reward/test": 1.0,
    }


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    require_trackers([])
    message = r"fit\.report_to: wandb not installed; pip install 'constrained-dpo\[tracking\]'"
    with pytest.raises(UserError, match=message):
        require_trackers(["wandb"])
    recipe = load_recipe(QUICKSTART, ["fit.report_to=[wandb]"])
    with pytest.raises(UserError, match="wandb not installed"):
        check_recipe(recipe, pilot=False, target_se={})
