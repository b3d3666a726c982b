"""The trainer against the installed TRL (DESIGN §7: invariant 2), and what it is built with."""

import copy

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from trl import DPOTrainer

from constrained_dpo.fit.build import training_config
from constrained_dpo.fit.rows import pair_dataset
from constrained_dpo.fit.trainer import FitPlan
from data_prep.errors import UserError
from tests.helpers.fits import (
    LORA,
    built_trainer,
    fit_settings,
    make_pairs,
    prompt_tokens,
    ragged_rows,
)

STEPS = {"steps": 20, "learning_rate": 2e-3}


class PlainTRL(DPOTrainer):
    """TRL's trainer on rows that are token ids already."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def as_trl(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows in the installed TRL's own columns, without what it does not read."""
    responses = rows["responses_ids"]
    columns = {
        "prompt_ids": list(rows["prompt_ids"]),
        "chosen_ids": [c for c, _ in responses],
        "rejected_ids": [r for _, r in responses],
    }
    return datasets.Dataset.from_dict(columns)


def trained(trainer) -> list[tuple[dict, float, dict[str, torch.Tensor]]]:
    """Batch, loss and gradients of every step of a training."""
    steps, original = [], trainer.training_step

    def step(model, inputs, num_items_in_batch=None):
        loss = original(model, inputs, num_items_in_batch)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        steps.append((inputs, loss.item(), gradients))
        return loss

    trainer.training_step = step
    trainer.train()
    return steps


@pytest.fixture(scope="module")
def rows(plain_policy) -> datasets.Dataset:
    return ragged_rows(plain_policy, 80, seed=0)


@pytest.fixture(scope="module")
def trl_steps(plain_policy, rows, tmp_path_factory):
    policy, folder = copy.deepcopy(plain_policy), tmp_path_factory.mktemp("trl")
    plan = FitPlan(fit_settings(**STEPS), LORA, beta=0.3, seed=3, output=folder)
    lora = LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = PlainTRL(
        model=policy.model,
        args=training_config(plan, policy.device.type),
        train_dataset=as_trl(rows),
        processing_class=policy.tokenizer,
        peft_config=lora,
    )
    return trained(trainer)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared prompts"])
def test_loss_and_gradients_of_twenty_steps_are_trls(
    plain_policy, rows, trl_steps, shared, tmp_path
):
    """Hard labels, fp32, the same batches of ragged lengths."""
    policy = copy.deepcopy(plain_policy)
    settings = STEPS | {"shared_prompts": shared}
    with built_trainer(policy, rows, tmp_path, beta=0.3, seed=3, **settings) as trainer:
        assert (trainer.padded_because is None) == shared
        steps = trained(trainer)
    assert len(steps) == len(trl_steps) == 20
    for number, (ours, theirs) in enumerate(zip(steps, trl_steps, strict=True)):
        if not shared:  # TRL puts all chosen responses before all rejected ones
            chosen, rejected = theirs[0]["input_ids"].chunk(2)
            in_pairs = torch.stack([chosen, rejected], dim=1).flatten(0, 1)
            assert torch.equal(ours[0]["input_ids"], in_pairs)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
        assert ours[2].keys() == theirs[2].keys()
        # Kernels of another shape round otherwise, and Adam's division by small second moments
        # makes that grow from step to step.
        atol = 2e-4 if shared and number else 2e-5
        for name, gradient in theirs[2].items():
            torch.testing.assert_close(ours[2][name], gradient, atol=atol, rtol=1e-3)
    assert abs(steps[-1][1] - steps[0][1]) > 1e-3  # it trained


def test_dropout_is_what_the_recipe_says(plain_policy, rows, tmp_path):
    lora = LORA.model_copy(update={"dropout": 0.3})
    with built_trainer(plain_policy, rows, tmp_path, lora=lora) as trainer:
        rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3}


def test_bad_pairs_and_lengths_are_refused(plain_policy, pool):
    tokens, pairs = prompt_tokens(plain_policy), make_pairs(pool)
    with pytest.raises(UserError, match="is not in the pool"):
        pair_dataset(pairs, pool.iloc[12:], tokens, 16)
    with pytest.raises(UserError, match="nothing is truncated"):
        pair_dataset(pairs, pool, tokens, 5)
    with pytest.raises(UserError, match="ref_logp is null"):
        pair_dataset(pairs, pool.assign(ref_logp=np.nan), tokens, 16)
