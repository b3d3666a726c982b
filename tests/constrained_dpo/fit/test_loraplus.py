"""LoRA+: B learns at a rate of its own, in every optimizer; and a family that goes on from another
or from a checkpoint."""

import copy
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from constrained_dpo.fit.family import FAMILY_WEIGHTS, read_family
from data_prep.errors import UserError
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.preferences import label_pairs
from tests.helpers.fits import LORA, built_trainer, fit_log, gated_rows, make_family, ragged_rows
from tests.helpers.moments import interrupt, when

RATE, RATIO = 1e-3, 16.0
OPTIMIZERS = ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
FAMILY = make_family()


def conditional_pairs(pool):
    series = lambda value: pd.Series({"harmless": value})
    law = MultiplierRange(series(0.5), series(0.05), 3.0)
    return label_pairs(pool, "helpful", law, labels="soft", pairs_per_prompt=6, seed=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_rates_in_every_optimizer(plain_policy, optimizer, tmp_path):
    """By the groups, and by what the first two steps of Adam move: about the rate, whatever the
    gradient is. (A stands still in the first, where B is 0.)"""
    rows, settings = (
        gated_rows(ragged_rows(plain_policy, 16, seed=0), FAMILY),
        {"optimizer": optimizer, "learning_rate": RATE, "loraplus_ratio": RATIO, "steps": 2},
    )
    settings |= {"lr_scheduler": "constant", "weight_decay": 0.01}
    with built_trainer(plain_policy, rows, tmp_path, family=FAMILY, **settings) as trainer:
        start = {n: p.detach().clone() for n, p in trained(trainer)}
        trainer.train()
        rates = rate_by_parameter(trainer)
        moved = {
            letter: max(
                float((p.detach() - start[n]).abs().max())
                for n, p in trained(trainer)
                if f"lora_{letter}" in n
            )
            for letter in "AB"
        }
        decays = {g["weight_decay"] for g in trainer.optimizer.param_groups if g["params"]}
    assert {rates[n] for n in rates if "lora_A" in n} == {RATE}
    assert {rates[n] for n in rates if "lora_B" in n} == {RATE * RATIO}
    assert rates.keys() == start.keys() and decays == {0.01}
    assert 0.9 < moved["B"] / (2 * RATE * RATIO) < 1.1
    assert 0.5 < moved["A"] / RATE < 2.1


def trained(trainer):
    return [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]


def rate_by_parameter(trainer) -> dict[str, float]:
    names = {id(p): n for n, p in trained(trainer)}
    groups = trainer.optimizer.param_groups
    return {names[id(p)]: g["lr"] for g in groups for p in g["params"]}


def test_both_rates_follow_the_schedule(plain_policy, tmp_path):
    rows, rates = ragged_rows(plain_policy, 16, seed=0), []
    settings = {"learning_rate": RATE, "loraplus_ratio": RATIO, "steps": 6, "warmup_steps": 2}
    with built_trainer(plain_policy, rows, tmp_path, lr_scheduler="cosine", **settings) as trainer:
        original = trainer.training_step

        def step(*arguments):
            rates.append(rate_by_parameter(trainer))
            return original(*arguments)

        trainer.training_step = step
        trainer.train()
    by_letter = {
        letter: np.array([{r for n, r in step.items() if letter in n}.pop() for step in rates])
        for letter in ("lora_A", "lora_B")
    }
    np.testing.assert_allclose(by_letter["lora_B"], RATIO * by_letter["lora_A"])
    assert by_letter["lora_A"].argmax() == 2 and by_letter["lora_A"][2] == pytest.approx(RATE)


def test_a_ratio_of_one_is_the_plain_optimizer(plain_policy, pool, tmp_path):
    """The Trainer's own groups; the adapter is the same to the last bit."""
    rows = ragged_rows(plain_policy, 8, seed=0)
    with built_trainer(plain_policy, rows, tmp_path, loraplus_ratio=1.0) as trainer:
        trainer.create_optimizer()
        assert len(trainer.optimizer.param_groups) == 2
        assert {g["lr"] for g in trainer.optimizer.param_groups} == {trainer.args.learning_rate}
    for name, changes in (("plain", {}), ("one", {"loraplus_ratio": 1.0})):
        fit_log(plain_policy, pool, tmp_path / name, **changes)
    first, second = (adapter_bytes(tmp_path / name / "adapter") for name in ("plain", "one"))
    assert first == second
    fit_log(plain_policy, pool, tmp_path / "two", loraplus_ratio=2.0)
    assert adapter_bytes(tmp_path / "two" / "adapter") != first


def adapter_bytes(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def family_bytes(folder) -> bytes:
    return (folder / "adapter" / FAMILY_WEIGHTS).read_bytes()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_family_starts_from_another(
    quickstart_policy, plain_policy, pool, quantization, tmp_path
):
    policy = quickstart_policy if quantization == "nf4" else plain_policy
    rows = gated_rows(ragged_rows(policy, 8, seed=0), FAMILY)
    fit_log(plain_policy, pool, tmp_path, labels=conditional_pairs(pool), plan={"family": FAMILY})
    before = load_file(tmp_path / "adapter" / FAMILY_WEIGHTS)
    settings = {"previous": tmp_path / "adapter", "family": FAMILY}
    with built_trainer(policy, rows, tmp_path / "next", **settings) as trainer:
        assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None
        for name, parameter in trained(trainer):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name.replace(".default", "")])
        trainer.model.eval()
        batch = trainer.data_collator(list(rows))
        with torch.no_grad():
            ratio = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
    assert ratio.abs().max() > 1e-3  # to π_ref, and not to the family it started from


def test_a_family_of_other_blocks_is_no_start(plain_policy, pool, tmp_path):
    fit_log(plain_policy, pool, tmp_path, labels=conditional_pairs(pool), plan={"family": FAMILY})
    assert read_family(tmp_path / "adapter") == FAMILY
    other = make_family("harmless", "short")
    rows = gated_rows(ragged_rows(plain_policy, 8, seed=0), other)
    settings = {"previous": tmp_path / "adapter", "family": other}
    with (
        pytest.raises(UserError, match="has blocks of harmless, and this fit of harmless, short"),
        built_trainer(copy.deepcopy(plain_policy), rows, tmp_path / "next", **settings),
    ):
        pass


@pytest.mark.slow
def test_an_interrupted_conditional_fit_equals_one_never_interrupted(
    plain_policy, pool, tmp_path, caplog
):
    """To the last bit: LoRA+, dropout, accumulation, a warm start."""
    caplog.set_level(logging.INFO, "constrained_dpo")
    labels = conditional_pairs(pool)
    fit_log(plain_policy, pool, tmp_path / "start", labels=labels, plan={"family": FAMILY})
    settings = {
        "labels": labels,
        "lora": LORA.model_copy(update={"dropout": 0.05}),
        "previous": tmp_path / "start" / "adapter",
        "plan": {"family": FAMILY},
        "steps": 12,
        "gradient_accumulation": 2,
        "loraplus_ratio": 8.0,
        "save_steps": 3,
    }
    checkpoints = tmp_path / "cut" / "checkpoints"
    sealed = lambda: len(list(checkpoints.glob("checkpoint-*/seal.json"))) == 2
    with pytest.raises(KeyboardInterrupt), when(sealed, interrupt):
        fit_log(plain_policy, pool, tmp_path / "cut", checkpoints=checkpoints, **settings)
    assert not (tmp_path / "cut" / "adapter").exists()
    log = fit_log(plain_policy, pool, tmp_path / "cut", checkpoints=checkpoints, **settings)
    assert "fit: goes on from checkpoint-" in caplog.text and not checkpoints.exists()
    whole = fit_log(plain_policy, pool, tmp_path / "whole", **settings)
    assert family_bytes(tmp_path / "cut") == family_bytes(tmp_path / "whole")
    losses = [[row["loss"] for row in one["log"] if "loss" in row] for one in (log, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
