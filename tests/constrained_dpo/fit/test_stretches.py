"""A fit in stretches: one schedule, one optimizer, new labels between; killed anywhere, the same
bits."""

import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from constrained_dpo.fit.family import FAMILY_WEIGHTS, is_family
from constrained_dpo.fit.stretch import Stretch
from constrained_dpo.fit.stretches import in_stretch
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.preferences import label_pairs
from tests.helpers.fits import LORA, fit_log, fit_settings, make_family, ragged_rows
from tests.helpers.moments import interrupt, when
from tests.helpers.paths import QUICKSTART

STEPS, COUNT = 12, 2
SETTINGS = {
    "steps": STEPS,
    "warmup_steps": 2,
    "learning_rate": 2e-3,
    "loraplus_ratio": 4.0,
    "gradient_accumulation": 2,
}
DROPOUT = LORA.model_copy(update={"dropout": 0.05})


def stretch_labels(pool, stretch: int, family=None) -> pd.DataFrame:
    """Each stretch has pairs of its own."""
    series = lambda value: pd.Series({"harmless": value})
    law = series(0.5) if family is None else MultiplierRange(series(0.5), series(0.05), 3.0)
    return label_pairs(pool, "helpful", law, labels="soft", pairs_per_prompt=6, seed=stretch)


def kept(folder: Path, stretch: int) -> Path:
    return folder / str(stretch) / "kept"


def play(policy, pool, folder: Path, stretch: int, *, family=None, **changes) -> dict:
    """One stretch of a fit; returns its log."""
    plan = {
        "stretch": Stretch(
            number=stretch,
            count=COUNT,
            begin=kept(folder, stretch - 1) if stretch else None,
            keep=kept(folder, stretch) if stretch < COUNT - 1 else None,
        ),
        "family": family,
    }
    (folder / str(stretch)).mkdir(parents=True, exist_ok=True)
    labels = stretch_labels(pool, stretch, family)
    settings = {"labels": labels, "lora": DROPOUT, "plan": plan, **SETTINGS, **changes}
    checkpoints = folder / "checkpoints"
    return fit_log(policy, pool, folder / str(stretch), checkpoints=checkpoints, **settings)


def weights(folder: Path, stretch: int) -> bytes:
    output = folder / str(stretch) / "adapter"
    name = FAMILY_WEIGHTS if is_family(output) else "adapter_model.safetensors"
    return (output / name).read_bytes()


def column(log: dict, key: str) -> dict[int, float]:
    """By step."""
    return {row["step"]: row[key] for row in log["log"] if key in row}


@pytest.fixture(scope="module", params=["plain", "family"])
def whole(request, plain_policy, pool, tmp_path_factory):
    """Two stretches without a kill: their folder, logs and family."""
    family = make_family() if request.param == "family" else None
    folder = tmp_path_factory.mktemp("whole")
    logs = [play(plain_policy, pool, folder, stretch, family=family) for stretch in range(COUNT)]
    return folder, logs, family


def test_the_stretches_are_one_schedule_on_labels_of_their_own(whole, plain_policy, pool, tmp_path):
    folder, (first, second), family = whole
    settings = {"labels": stretch_labels(pool, 0, family), "lora": DROPOUT, **SETTINGS}
    one = fit_log(plain_policy, pool, tmp_path, plan={"family": family}, **settings)
    rates = column(one, "learning_rate")
    assert list(rates) == list(range(1, STEPS + 1))
    assert column(first, "learning_rate") == {step: rates[step] for step in range(1, 7)}
    assert column(second, "learning_rate") == rates
    losses, other = column(second, "loss"), column(one, "loss")
    assert {k: losses[k] for k in range(1, 7)} == column(first, "loss")
    assert len(losses) == STEPS and losses[8] != other[8]
    assert first["anchor_error"] is not None and second["anchor_error"] is None
    names = {file.name for file in kept(folder, 0).iterdir()}
    assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert not (folder / "checkpoints").exists() and weights(folder, 0) != weights(folder, 1)


def test_the_optimizer_goes_on(whole, plain_policy, pool, tmp_path):
    """A stretch that starts from the weights alone, its moments lost, goes elsewhere."""
    folder, _, family = whole
    shutil.copytree(folder / "0", tmp_path / "0")
    play(plain_policy, pool, tmp_path, 1, family=family)
    assert weights(tmp_path, 1) == weights(folder, 1)
    file = kept(tmp_path, 0) / "optimizer.pt"
    state = torch.load(file)
    for moments in state["state"].values():
        moments["exp_avg"].zero_()
    torch.save(state, file)
    shutil.rmtree(tmp_path / "1")
    play(plain_policy, pool, tmp_path, 1, family=family)
    assert weights(tmp_path, 1) != weights(folder, 1)


@pytest.mark.parametrize(
    "save_steps",
    [pytest.param(None, marks=pytest.mark.slow), 2],
    ids=["without checkpoints", "with checkpoints"],
)
def test_stretches_killed_anywhere_give_the_same_bits(
    whole, plain_policy, pool, save_steps, tmp_path, caplog
):
    """Inside each stretch, and between the policy of the first and its checkpoint."""
    caplog.set_level(logging.INFO, "constrained_dpo")
    folder, (_, expected), family = whole
    checkpoints = tmp_path / "checkpoints"
    again = lambda stretch: play(
        plain_policy, pool, tmp_path, stretch, family=family, save_steps=save_steps
    )
    for stretch in range(COUNT):
        wanted = "seal.json" if save_steps else "optimizer.pt"
        inside = lambda wanted=wanted: any(checkpoints.glob(f"checkpoint-*/{wanted}"))
        cut = save_steps or not stretch  # the last stretch writes none but those
        if cut:
            with pytest.raises(KeyboardInterrupt), when(inside, interrupt):
                again(stretch)
            assert not kept(tmp_path, stretch).exists()
        log = again(stretch)
        if stretch == 0:  # as killed after the policy appeared
            shutil.move(kept(tmp_path, 0), tmp_path / "lost")
            again(0)
            assert weights(tmp_path, 0) == weights(folder, 0)
    assert weights(tmp_path, 1) == weights(folder, 1)
    assert column(log, "loss") == column(expected, "loss")
    resumed = caplog.text.count("goes on from checkpoint-")
    assert resumed == (2 if save_steps else 0)
    assert not checkpoints.exists()


def test_a_stretch_is_whole_permutations_and_the_beginning_of_another(plain_policy, tmp_path):
    rows = ragged_rows(plain_policy, 10, seed=0)
    rows = rows.add_column("row", list(range(10)))
    plan = lambda number, **changes: FitPlan(
        fit_settings(**changes), LORA, 0.25, 7, tmp_path, stretch=Stretch(number, 3, keep=tmp_path)
    )
    whole, chosen, end = in_stretch(plan(1, steps=20, batch_size=4), rows)
    assert whole.settings.steps == 21 and end == 14 and len(chosen) == 7 * 4
    for begin in (0, 10):
        assert sorted(chosen["row"][begin : begin + 10]) == list(range(10))
    assert len(set(chosen["row"][20:])) == 8
    _, same, _ = in_stretch(plan(1, steps=20, batch_size=4), rows)
    _, other, _ = in_stretch(plan(2, steps=20, batch_size=4), rows)
    assert list(same["row"]) == list(chosen["row"]) != list(other["row"])
    epochs, chosen, end = in_stretch(plan(0, steps=None, epochs=1.5, batch_size=4), rows)
    assert (epochs.settings.steps, epochs.settings.epochs, end, len(chosen)) == (12, None, 4, 16)
    few, chosen, end = in_stretch(plan(0, steps=1, batch_size=4), rows)
    assert few.settings.steps == 3 and end == 1 and len(chosen) == 4


def test_stretches_on_held_out_prompts_are_measured_once_more_each(plain_policy, pool, tmp_path):
    """Held-out rows are no part of either stretch."""
    logs = [play(plain_policy, pool, tmp_path, k, holdout=0.25, eval_steps=3) for k in range(2)]
    assert list(column(logs[1], "eval_residual")) == [0, 3, 6, 9, 12]
    assert logs[0]["held_out"]["prompts"] == logs[1]["held_out"]["prompts"] == 2


def test_sharded_launches_have_no_stretches(plain_policy, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    plan = FitPlan(fit_settings(), LORA, 0.25, 0, tmp_path, stretch=Stretch(0, 2, keep=tmp_path))
    with pytest.raises(UserError, match=r"fit\.refresh: a fit cannot be cut .*set it to 1"):
        in_stretch(plan, ragged_rows(plain_policy, 4, seed=0))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["fit.holdout=0.2", "fit.early_stop=3"], r"fit\.early_stop ends a fit of one stretch"),
        (["pool.grow=false"], r"fit\.refresh: .*set pool\.grow to true"),
        (
            ["fit.labels=given", "fit.label_column=better_response_id", "pool.source=dataset"],
            r"fit\.labels: given are the dataset's own .*set fit\.refresh to 1",
        ),
        (["fit.refresh=0"], r"fit\.refresh"),
    ],
)
def test_what_does_not_go_with_stretches_is_refused(overrides, match):
    load_recipe(QUICKSTART, ["fit.refresh=2"])
    with pytest.raises(UserError, match=match):
        load_recipe(QUICKSTART, ["fit.refresh=2", *overrides])
