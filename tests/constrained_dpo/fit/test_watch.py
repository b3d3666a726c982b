"""What is watched while a fit runs: every step's log, and numbers that are not finite."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from constrained_dpo.run.create import init_run
from data_prep.quickstart import build_policy
from tests.helpers.cli import cdpo
from tests.helpers.fits import fit_log, make_pairs, make_pool
from tests.helpers.paths import QUICKSTART, SMALL

LOGGED = {
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "kl",
    "kl_ess",
}
DIVERGING = {"learning_rate": 1e30, "lr_scheduler": "constant", "max_grad_norm": 1e30}


def test_every_step_is_logged(plain_policy, pool, tmp_path):
    log = fit_log(plain_policy, pool, tmp_path, steps=6, gradient_accumulation=2)
    rows = [row for row in log["log"] if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row.keys() >= LOGGED and all(math.isfinite(row[name]) for name in LOGGED)
    assert abs(rows[0]["kl"]) < 1e-5  # the adapter starts as π_ref
    assert all(1 <= row["kl_ess"] <= 8 + 1e-6 for row in rows)


def test_responses_whose_law_nobody_knows_have_no_kl(plain_policy, pool, tmp_path):
    log = fit_log(plain_policy, pool.assign(sample_logp=np.nan), tmp_path, steps=2)
    assert all("kl" not in row and "loss" in row for row in log["log"][:2])


def test_a_loss_that_is_not_finite_stops_the_fit_and_leaves_its_batch(plain_policy, pool, tmp_path):
    pairs = make_pairs(pool)
    message = r"fit: the loss is (nan|inf) at step (\d+); its batch is in .*bad_batch.json"
    with pytest.raises(FloatingPointError, match=message) as stop:
        fit_log(plain_policy, pool, tmp_path, **DIVERGING)
    assert not (tmp_path / "adapter").exists()
    assert np.isfinite(make_pool(plain_policy)["ref_logp"]).all()  # the base is as it was
    batch = json.loads((tmp_path / "bad_batch.json").read_text())
    assert f"at step {batch['step']};" in str(stop.value) and len(batch["rows"]) == 4
    responses, names = pool.set_index("response_id"), ["prompt_id", "chosen_id", "rejected_id"]
    for row in batch["rows"]:
        pair = pairs.iloc[row["row"]]
        assert [row[name] for name in names] == pair[names].tolist()
        chosen, rejected = (responses.loc[row[name]] for name in names[1:])
        assert row["responses_ids"][0] == chosen["token_ids"].tolist()
        assert row["ref_logps"][1] == pytest.approx(rejected["ref_logp"])
        assert row["target"] == pytest.approx(pair["target"])
        assert row["margin"] == pytest.approx(pair["margin"])
    assert any(value == "nan" for row in batch["rows"] for value in row["policy_logps"])

    fit_log(plain_policy, pool, tmp_path, steps=1)  # the next fit that succeeds takes it away
    assert not (tmp_path / "bad_batch.json").exists()


def test_a_gradient_that_is_not_finite_stops_a_fit_whose_loss_is_finite(
    plain_policy, pool, tmp_path
):
    """An adapter whose two factors are 1e-25 and 1e25 of the usual: the same policy, and a gradient
    that overflows."""
    fit_log(plain_policy, pool, tmp_path, learning_rate=5e-3)
    previous = shutil.move(tmp_path / "adapter", tmp_path / "previous")
    file = previous / "adapter_model.safetensors"
    scale = lambda name: 1e-25 if "lora_A" in name else 1e25
    weights = {name: value * scale(name) for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    settings = {"gradient_accumulation": 2, "steps": 3, "save_steps": 1}
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is (inf|nan) at step 1;"):
        fit_log(
            plain_policy, pool, tmp_path, previous=previous, checkpoints=checkpoints, **settings
        )
    rows = json.loads((tmp_path / "bad_batch.json").read_text())["rows"]
    assert len(rows) == 8  # both forwards of the step
    assert all(math.isfinite(value) for row in rows for value in row["policy_logps"])
    assert not list(checkpoints.glob("checkpoint-*"))  # what such a step did is not saved


def test_a_run_whose_fit_diverges_fails_in_one_line_and_can_be_resumed(tmp_path):
    overrides = [
        *SMALL,
        "prompts.max_fit=8",
        "prompts.max_test=4",
        "fit.learning_rate=1e30",
        "fit.max_grad_norm=1e30",
        "fit.warmup_steps=0",
        f"policy.model={build_policy()}",
    ]
    run = init_run(QUICKSTART, tmp_path / "run", overrides)
    for _ in range(2):
        lines = cdpo("round", run.path, check=1).stderr.strip().splitlines()
        errors = [line for line in lines if not line.startswith(("prepare:", "round "))]
        assert len(errors) == 1 and errors[0].startswith("error: fit: the loss is"), lines
        assert str(run.round_folder(0) / "bad_batch.json") in errors[0]
    assert run.pairs_file(0).exists() and not run.adapter_folder(0).exists()
    assert len(run.state().lambda_) == 1
