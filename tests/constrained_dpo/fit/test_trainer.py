"""The fit against the installed TRL, and the invariants of a warm-started QLoRA fit (DESIGN §7: 1,
2, 9, 10)."""

import copy
import hashlib

import datasets
import numpy as np
import pytest
import torch

from constrained_dpo.fit.adapter import check_anchor, fit_adapter
from constrained_dpo.fit.losses import pair_loss
from constrained_dpo.fit.rows import pair_dataset
from constrained_dpo.fit.trainer import FitPlan, build_trainer, training_config
from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.sampling.generate import Sampler
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import (
    LORA,
    PROMPT_TABLE,
    SAMPLING,
    fit_settings,
    make_pairs,
    make_pool,
    prompt_tokens,
    ragged_rows,
)


def base_hash(policy) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def plain_policy():
    return load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))


def test_pair_loss_is_the_expectation_of_the_drawn_loss():
    difference, target = torch.linspace(-3, 3, 7), torch.linspace(0, 1, 7)
    win, lose = pair_loss(difference, torch.ones(7)), pair_loss(-difference, torch.ones(7))
    torch.testing.assert_close(pair_loss(difference, target), target * win + (1 - target) * lose)
    torch.testing.assert_close(win, -torch.log(torch.sigmoid(difference)))


def test_soft_loss_is_minimal_where_the_log_ratio_is_the_score_difference():
    difference = torch.tensor([0.7], requires_grad=True)
    pair_loss(difference, torch.sigmoid(torch.tensor([0.7]))).sum().backward()
    assert difference.grad.abs().item() < 1e-7


def as_trl(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows in the installed TRL's own columns, without what it does not read."""
    responses = rows["responses_ids"]
    columns = {
        "prompt_ids": list(rows["prompt_ids"]),
        "chosen_ids": [c for c, _ in responses],
        "rejected_ids": [r for _, r in responses],
    }
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("shared", [False, True])
def test_parity_with_trl_over_twenty_steps(plain_policy, shared, tmp_path):
    """Invariant 2: hard labels, fp32, same batches, ragged lengths: loss and gradients equal the
    installed DPOTrainer's."""
    from peft import LoraConfig
    from trl import DPOTrainer

    class PlainTRL(DPOTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return dataset

    rows = ragged_rows(plain_policy, 80, seed=0)
    settings = fit_settings(steps=20, learning_rate=2e-3, shared_prompts=shared)
    recorded = {}
    for kind in ("trl", "ours"):
        policy = copy.deepcopy(plain_policy)
        if kind == "ours":
            trainer = build_trainer(
                policy, rows, FitPlan(settings, LORA, beta=0.3, seed=3, output=tmp_path)
            )
            assert (trainer.padded_because is None) == shared
        else:
            trainer = PlainTRL(
                model=policy.model,
                args=training_config(FitPlan(settings, LORA, 0.3, 3, tmp_path), policy.device.type),
                train_dataset=as_trl(rows),
                processing_class=policy.tokenizer,
                peft_config=LoraConfig(
                    r=LORA.r,
                    lora_alpha=LORA.alpha,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
        steps = recorded[kind] = []
        original = trainer.training_step

        def step(model, inputs, num_items_in_batch=None, original=original, steps=steps):
            loss = original(model, inputs, num_items_in_batch)
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            steps.append((inputs, loss.item(), gradients))
            return loss

        trainer.training_step = step
        trainer.train()
    assert len(recorded["ours"]) == len(recorded["trl"]) == 20
    for step, ((ours_inputs, ours_loss, ours_grad), (inputs, loss, grad)) in enumerate(
        zip(recorded["ours"], recorded["trl"], strict=True)
    ):
        if not shared:  # TRL puts all chosen responses before all rejected ones
            chosen, rejected = inputs["input_ids"].chunk(2)
            assert torch.equal(
                ours_inputs["input_ids"], torch.stack([chosen, rejected], dim=1).flatten(0, 1)
            )
        assert ours_loss == pytest.approx(loss, abs=1e-5)
        assert ours_grad.keys() == grad.keys()
        for name in grad:
            # Kernels of another shape round otherwise, and Adam's division by small second
            # moments makes that grow from step to step.
            torch.testing.assert_close(
                ours_grad[name], grad[name], atol=2e-4 if shared and step else 2e-5, rtol=1e-3
            )
    assert abs(recorded["ours"][-1][1] - recorded["ours"][0][1]) > 1e-3  # it trained


def test_warm_start_keeps_the_anchor_the_base_and_float32(quickstart_policy, tmp_path):
    """Invariants 1 and 9 on a real NF4 base: two fits, the second warm-started from the first."""
    policy = quickstart_policy
    before = base_hash(policy)
    pool = make_pool(policy)
    pairs, tokens, settings = (
        make_pairs(pool),
        prompt_tokens(policy),
        fit_settings(learning_rate=5e-3),
    )
    first, second = tmp_path / "a", tmp_path / "b"
    anchor_error = fit_adapter(
        policy, pairs, pool, tokens, FitPlan(settings, LORA, beta=0.25, seed=0, output=first)
    )
    assert anchor_error < 1e-4
    assert base_hash(policy) == before, "the fit changed the base weights"

    trainer = build_trainer(
        policy,
        pair_dataset(pairs, pool, tokens, 16),
        FitPlan(settings, LORA, beta=0.25, seed=0, output=tmp_path / "x", previous_adapter=first),
    )
    try:
        assert list(trainer.model.peft_config) == ["default"], (
            "an adapter beside `default` would become TRL's reference"
        )
        from peft import load_peft_weights

        saved = load_peft_weights(str(first))
        live = {
            n.replace(".default", ""): p
            for n, p in trainer.model.named_parameters()
            if p.requires_grad
        }
        assert saved.keys() == live.keys()
        for name, value in saved.items():
            torch.testing.assert_close(live[name].detach(), value, rtol=0, atol=0)
            assert live[name].dtype == torch.float32, f"{name} is {live[name].dtype}"
        # The loss at the start: log-ratios to π_ref (the base), not to the previous round's
        # policy, under which they would be 0.
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        loss = trainer.compute_loss(trainer.model, batch).item()
        rows = trainer.train_dataset.select(range(8))
        ids = (
            [p for p in rows["prompt_ids"] for _ in range(2)],
            [ids for pair in rows["responses_ids"] for ids in pair],
        )
        now, _ = response_logps(trainer.model, *ids, pad_id=0, batch_size=8)
        with trainer.model.disable_adapter():
            base, _ = response_logps(trainer.model, *ids, pad_id=0, batch_size=8)
        np.testing.assert_allclose(
            np.ravel(rows["ref_logps"]),
            base,
            atol=1e-4,
            err_msg="the reference is not the base model",
        )
        chosen, rejected = torch.tensor(now - base).view(-1, 2).T
        expected = (
            pair_loss(0.25 * (chosen - rejected), torch.tensor(list(rows["target"])).double())
            .mean()
            .item()
        )
        assert loss == pytest.approx(expected, abs=1e-5)
        untrained = pair_loss(torch.zeros(8), torch.tensor(list(rows["target"]))).mean().item()
        assert abs(loss - untrained) > 1e-3, (
            "the log-ratios are to the previous round's policy, not to the reference policy"
        )
        trainer.train()
        states = trainer.optimizer.state.values()
        assert states and all(
            v.dtype == torch.float32 for s in states for v in s.values() if torch.is_tensor(v)
        )
    finally:
        trainer.model.unload()
        policy.model.__dict__.pop("forward", None)

    fit_adapter(
        policy,
        pairs,
        pool,
        tokens,
        FitPlan(settings, LORA, beta=0.25, seed=0, previous_adapter=first, output=second),
    )
    assert base_hash(policy) == before
    from peft import load_peft_weights

    old, new = load_peft_weights(str(first)), load_peft_weights(str(second))
    assert all((old[n] != new[n]).float().mean() > 0.9 for n in old), (
        "most adapter entries must move in a fit"
    )


def test_the_fit_refuses_a_pool_of_another_base(quickstart_policy, tmp_path):
    """Invariant 1, the round-0 check: stored ref_logp that are not this base's stop the fit."""
    pool = make_pool(quickstart_policy)
    shifted = pool.assign(ref_logp=pool["ref_logp"] - 0.01)
    with pytest.raises(UserError, match=r"differs from the stored ref_logp by 0\.01"):
        fit_adapter(
            quickstart_policy,
            make_pairs(pool),
            shifted,
            prompt_tokens(quickstart_policy),
            FitPlan(fit_settings(), LORA, beta=0.25, seed=0, output=tmp_path / "a"),
        )
    assert not (tmp_path / "a").exists()


def test_dropout_is_what_the_recipe_says(quickstart_policy, tmp_path):
    pool = make_pool(quickstart_policy)
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(quickstart_policy), 16)
    trainer = build_trainer(
        quickstart_policy,
        rows,
        FitPlan(
            fit_settings(),
            LORA.model_copy(update={"dropout": 0.3}),
            beta=0.25,
            seed=0,
            output=tmp_path,
        ),
    )
    try:
        rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {0.3}
    finally:
        trainer.model.unload()
        quickstart_policy.model.__dict__.pop("forward", None)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_gradients_are_the_same_before_and_after_sampling(quantization, tmp_path):
    """Invariant 10: on one loaded object, LoRA gradients survive a generate() + scoring pass, and
    eval equals train mode."""
    policy = load_policy(
        PolicySettings(model="quickstart", quantization=quantization, dtype="float32")
    )
    pool = make_pool(policy)
    tokens = prompt_tokens(policy)
    first = tmp_path / "first"
    settings = fit_settings(learning_rate=5e-3)
    fit_adapter(
        policy,
        make_pairs(pool),
        pool,
        tokens,
        FitPlan(settings, LORA, beta=0.25, seed=0, output=first),
    )

    def gradients():
        rows = pair_dataset(make_pairs(pool), pool, tokens, 16)
        trainer = build_trainer(
            policy,
            rows,
            FitPlan(
                settings, LORA, beta=0.25, seed=0, output=tmp_path / "x", previous_adapter=first
            ),
        )
        try:
            trainer.model.train()
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
            trainer.compute_loss(trainer.model, batch).backward()
            found = {
                n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad
            }
            modes = []
            for train in (True, False):
                trainer.model.train(train)
                chosen = (
                    list(rows["prompt_ids"])[:8],
                    [pair[0] for pair in rows["responses_ids"]][:8],
                )
                modes.append(response_logps(trainer.model, *chosen, pad_id=0, batch_size=8)[0])
            return found, modes
        finally:
            trainer.model.unload()
            policy.model.__dict__.pop("forward", None)

    before, _ = gradients()
    make_pool(policy, adapter=first, seed=9)
    after, (train_mode, eval_mode) = gradients()
    for name, gradient in before.items():
        scale = gradient.abs().max().clamp(min=1e-8)
        assert (after[name] - gradient).abs().max() <= 1e-4 * scale, (
            f"the gradient of {name} changed after sampling"
        )
    # bitsandbytes' int8 product takes another kernel in training mode; 4-bit and plain layers
    # must agree to fp32 rounding.
    np.testing.assert_allclose(train_mode, eval_mode, atol=0.02 if quantization == "int8" else 1e-4)


def test_the_adapter_loads_in_plain_peft(quickstart_policy, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))
    pool, tokens = make_pool(policy), prompt_tokens(policy)
    out = tmp_path / "adapter"
    fit_adapter(
        policy,
        make_pairs(pool),
        pool,
        tokens,
        FitPlan(fit_settings(), LORA, beta=0.25, seed=0, output=out),
    )
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(policy.model.name_or_path), str(out)
    ).eval()
    rows = list(pool["token_ids"].map(list))[:20]
    prompts = [tokens[p] for p in pool["prompt_id"][:20]]
    theirs, _ = response_logps(plain, prompts, rows, pad_id=0, batch_size=8)
    with attached_adapter(policy, out) as model:
        ours, _ = response_logps(model, prompts, rows, pad_id=0, batch_size=8)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - pool["ref_logp"][:20]).max() > 1e-3


def test_bad_pairs_and_lengths_are_refused(quickstart_policy):
    pool, tokens = make_pool(quickstart_policy), prompt_tokens(quickstart_policy)
    pairs = make_pairs(pool)
    with pytest.raises(UserError, match="is not in the pool"):
        pair_dataset(pairs, pool.iloc[12:], tokens, 16)
    with pytest.raises(UserError, match="nothing is truncated"):
        pair_dataset(pairs, pool, tokens, 5)
    with pytest.raises(UserError, match="ref_logp is null"):
        pair_dataset(pairs, pool.assign(ref_logp=np.nan), tokens, 16)


def test_a_diverging_fit_stops_and_leaves_no_adapter(quickstart_policy, tmp_path):
    pool = make_pool(quickstart_policy)
    with pytest.raises(FloatingPointError, match="the loss is"):
        fit_adapter(
            quickstart_policy,
            make_pairs(pool),
            pool,
            prompt_tokens(quickstart_policy),
            FitPlan(
                fit_settings(learning_rate=1e30, lr_scheduler="constant", max_grad_norm=1e30),
                LORA,
                beta=0.25,
                seed=0,
                output=tmp_path / "a",
            ),
        )
    assert not (tmp_path / "a").exists()
    check = Sampler(quickstart_policy, prompt_tokens(quickstart_policy), SAMPLING).draw(
        PROMPT_TABLE, responses_per_prompt=2, adapter=None, source="reference", seed=0
    )
    assert np.isfinite(check["ref_logp"]).all()  # the base is as it was


def test_anchor_tolerance_is_reported(quickstart_policy):
    pool = make_pool(quickstart_policy)
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(quickstart_policy), 16)
    assert check_anchor(quickstart_policy, quickstart_policy.model, rows) < 1e-4
