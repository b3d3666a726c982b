"""The invariants of a fit on a quantized base (DESIGN §7: 1, 9, 10): its anchor is π_ref, the base
is never changed, the adapter is float32, and sampling changes no gradient."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel, load_peft_weights
from transformers import AutoModelForCausalLM

from constrained_dpo.fit.adapter import check_anchor
from constrained_dpo.fit.losses import pair_loss
from constrained_dpo.fit.rows import pair_dataset
from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import built_trainer, fit_log, make_pairs, make_pool, prompt_tokens

RATE = {"learning_rate": 5e-3}


def base_hash(policy) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def quantized(quickstart_policy):
    """The NF4 base, its hash before any fit here, and its pool."""
    return quickstart_policy, base_hash(quickstart_policy), make_pool(quickstart_policy)


@pytest.fixture(scope="module")
def first(quantized, tmp_path_factory):
    """The adapter of a fit from π_ref."""
    policy, before, pool = quantized
    folder = tmp_path_factory.mktemp("first")
    log = fit_log(policy, pool, folder, **RATE)
    assert log["anchor_error"] < 1e-4
    assert base_hash(policy) == before, "the fit changed the base weights"
    return folder / "adapter"


def adapter_weights(trainer) -> dict[str, torch.Tensor]:
    """The trained weights, under the names that they are saved with."""
    named = trainer.model.named_parameters()
    return {n.replace(".default", ""): p.detach().clone() for n, p in named if p.requires_grad}


@pytest.fixture(scope="module")
def warm(quantized, first, tmp_path_factory) -> SimpleNamespace:
    """What a trainer says before and after a training that starts from the first adapter."""
    policy, _, pool = quantized
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(policy), 16)
    folder = tmp_path_factory.mktemp("warm")
    with built_trainer(policy, rows, folder, previous=first, **RATE) as trainer:
        few = trainer.train_dataset.select(range(8))
        prompts = [p for p in few["prompt_ids"] for _ in range(2)]
        responses = [ids for pair in few["responses_ids"] for ids in pair]
        logps = lambda: response_logps(trainer.model, prompts, responses, pad_id=0, batch_size=8)
        facts = SimpleNamespace(
            adapters=list(trainer.model.peft_config),
            start=adapter_weights(trainer),
            rows=few,
            loss=trainer.compute_loss(trainer.model, trainer.data_collator(list(few))).item(),
            policy_logps=logps(),
        )
        with trainer.model.disable_adapter():
            facts.base_logps = logps()
        trainer.train()
        facts.end = adapter_weights(trainer)
        states = trainer.optimizer.state.values()
        facts.moments = [v for state in states for v in state.values() if torch.is_tensor(v)]
    facts.base_hash = base_hash(policy)
    return facts


def test_a_warm_start_is_the_saved_adapter_alone_in_float32(warm, first):
    assert warm.adapters == ["default"], "another would become TRL's reference"
    saved = load_peft_weights(str(first))
    assert saved.keys() == warm.start.keys()
    for name, value in saved.items():
        torch.testing.assert_close(warm.start[name], value, rtol=0, atol=0)
        assert warm.start[name].dtype == torch.float32, f"{name} is {warm.start[name].dtype}"


def test_the_loss_of_a_warm_start_is_to_the_reference_policy(warm):
    """Its log-ratios are to the base, not to the previous round's policy, under which they would be
    0."""
    np.testing.assert_allclose(np.ravel(warm.rows["ref_logps"]), warm.base_logps, atol=1e-4)
    chosen, rejected = torch.tensor(warm.policy_logps - warm.base_logps).view(-1, 2).T
    target = torch.tensor(list(warm.rows["target"])).double()
    expected = pair_loss(0.25 * (chosen - rejected), target).mean().item()
    assert warm.loss == pytest.approx(expected, abs=1e-5)
    untrained = pair_loss(torch.zeros(8), target).mean().item()
    assert abs(warm.loss - untrained) > 1e-3, "the log-ratios are to the previous round's policy"


def test_a_warm_fit_moves_most_of_the_adapter_in_float32_and_nothing_of_the_base(warm, quantized):
    assert warm.moments and all(value.dtype == torch.float32 for value in warm.moments)
    moved = [(warm.start[n] != warm.end[n]).float().mean() for n in warm.start]
    assert min(moved) > 0.9
    assert warm.base_hash == quantized[1], "the fit changed the base weights"


def test_the_fit_refuses_a_pool_of_another_base(plain_policy, pool, tmp_path):
    """Invariant 1, the round-0 check: stored ref_logp that are not this base's stop the fit."""
    shifted = pool.assign(ref_logp=pool["ref_logp"] - 0.01)
    with pytest.raises(UserError, match=r"differs from the stored ref_logp by 0\.01"):
        fit_log(plain_policy, shifted, tmp_path, labels=make_pairs(pool))
    assert not (tmp_path / "adapter").exists()


def test_the_anchor_of_the_base_itself_is_within_rounding(quantized):
    policy, _, pool = quantized
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(policy), 16)
    assert check_anchor(policy, policy.model, rows) < 1e-4


@pytest.mark.parametrize(
    "quantization", ["nf4", *(pytest.param(q, marks=pytest.mark.slow) for q in ("int8", "none"))]
)
def test_gradients_are_the_same_before_and_after_sampling(quantization, tmp_path):
    """Invariant 10: on one loaded object, LoRA gradients survive a generate() + scoring pass, and
    eval equals train mode."""
    policy = load_policy(
        PolicySettings(model="quickstart", quantization=quantization, dtype="float32")
    )
    pool = make_pool(policy)
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(policy), 16)
    fit_log(policy, pool, tmp_path, **RATE)
    adapter = tmp_path / "adapter"

    def gradients():
        with built_trainer(policy, rows, tmp_path / "x", previous=adapter, **RATE) as trainer:
            trainer.model.train()
            few = rows.select(range(8))
            trainer.compute_loss(trainer.model, trainer.data_collator(list(few))).backward()
            named = trainer.model.named_parameters()
            gradients = {n: p.grad.clone() for n, p in named if p.requires_grad}
            prompts, chosen = list(few["prompt_ids"]), [pair[0] for pair in few["responses_ids"]]
            modes = []
            for train in (True, False):
                trainer.model.train(train)
                logps = response_logps(trainer.model, prompts, chosen, pad_id=0, batch_size=8)
                modes.append(logps)
            return gradients, modes

    before, _ = gradients()
    make_pool(policy, adapter=adapter, seed=9)
    after, (train_mode, eval_mode) = gradients()
    for name, gradient in before.items():
        scale = gradient.abs().max().clamp(min=1e-8)
        assert (after[name] - gradient).abs().max() <= 1e-4 * scale, (
            f"the gradient of {name} changed after sampling"
        )
    # bitsandbytes' int8 product takes another kernel in training mode; 4-bit and plain layers
    # must agree to fp32 rounding.
    np.testing.assert_allclose(train_mode, eval_mode, atol=0.02 if quantization == "int8" else 1e-4)


def test_the_adapter_loads_in_plain_peft(plain_policy, pool, tmp_path):
    fit_log(plain_policy, pool, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(plain_policy.model.name_or_path)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    few, tokens = pool.head(20), prompt_tokens(plain_policy)
    drawn = few["token_ids"].map(list).tolist()
    prompts = [tokens[p] for p in few["prompt_id"]]
    theirs = response_logps(plain, prompts, drawn, pad_id=0, batch_size=8)
    with attached_adapter(plain_policy, tmp_path / "adapter") as model:
        ours = response_logps(model, prompts, drawn, pad_id=0, batch_size=8)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - few["ref_logp"]).max() > 1e-3
