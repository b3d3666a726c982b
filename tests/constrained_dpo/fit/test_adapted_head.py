"""An adapter on the language-model head too: trained in both layouts, saved without the base's
weights, merged where weights are tied."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open

from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.trainer import FitPlan, build_trainer
from data_prep.models.adapters import attached_adapter, merge_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import LoraSettings, PolicySettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import fit_settings, make_pairs, make_pool, prompt_tokens, ragged_rows
from tests.helpers.models import save_tiny_causal_lm

HEAD = LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj", "lm_head"])
BETA = 0.3


@pytest.fixture(scope="module")
def plain_policy():
    return load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_are_those_of_the_models_own_logits(plain_policy, shared, tmp_path):
    """TRL's fused head reads the head's weight alone: with it the loss would be another and lora_B
    of the head would never move."""
    policy, rows = copy.deepcopy(plain_policy), ragged_rows(plain_policy, 6, seed=0)
    settings = fit_settings(batch_size=6, shared_prompts=shared)
    trainer = build_trainer(
        policy, rows, FitPlan(settings, HEAD, beta=BETA, seed=0, output=tmp_path)
    )
    assert trainer.adapted_head and (trainer.padded_because is None) == shared
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator(list(rows))).backward()
    found = {name: p.grad.clone() for name, p in trained.items()}
    trainer.model.zero_grad()
    loss = 0.0
    for row in rows:
        ratios = []
        for response, ref_logp in zip(row["responses_ids"], row["ref_logps"], strict=True):
            steps = (
                trainer.model(torch.tensor([row["prompt_ids"] + response]))
                .logits[0, len(row["prompt_ids"]) - 1 : -1]
                .log_softmax(-1)
            )
            ratios.append(steps.gather(1, torch.tensor(response)[:, None]).sum() - ref_logp)
        loss = loss - torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])) / len(rows)
    loss.backward()
    heads = [name for name in trained if "lm_head" in name]
    assert len(heads) == 2 and all(trained[name].grad.abs().max() > 1e-4 for name in heads)
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_the_adapter_holds_no_weights_of_the_base_and_goes_on_from_itself(
    quickstart_policy, tmp_path
):
    policy = quickstart_policy
    pool, tokens = make_pool(policy), prompt_tokens(policy)
    pairs, settings = make_pairs(pool), fit_settings(learning_rate=5e-3)
    first, second = tmp_path / "a", tmp_path / "b"
    for previous, output in ((None, first), (first, second)):
        fit_adapter(
            policy,
            pairs,
            pool,
            tokens,
            FitPlan(settings, HEAD, beta=BETA, seed=0, previous_adapter=previous, output=output),
        )
    with (
        safe_open(str(second / "adapter_model.safetensors"), "pt") as one,
        safe_open(str(first / "adapter_model.safetensors"), "pt") as other,
    ):
        assert all(".lora_A." in name or ".lora_B." in name for name in one.keys())
        moved = {
            n: (one.get_tensor(n) - other.get_tensor(n)).abs().max()
            for n in one.keys()
            if "lm_head" in n
        }
    assert len(moved) == 2 and all(difference > 1e-4 for difference in moved.values())


def test_a_tied_head_is_merged_into_weights_of_its_own(tmp_path):
    """The merged checkpoint, loaded by plain transformers, has the log-probabilities of base +
    adapter, and the base's embeddings."""
    base = save_tiny_causal_lm(tmp_path / "base")
    tied = transformers.AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(base)
    settings = PolicySettings(model=str(base), quantization="none", dtype="float32")
    policy = load_policy(settings)
    rows = ragged_rows(policy, 8, seed=0)
    trainer = build_trainer(
        policy, rows, FitPlan(fit_settings(), HEAD, beta=BETA, seed=0, output=tmp_path / "fit")
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    trainer.model.unload()
    merge_adapter(settings, str(base), tmp_path / "adapter", tmp_path / "merged", "test")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    embeddings = (
        transformers.AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    )
    torch.testing.assert_close(merged.get_input_embeddings().weight, embeddings, atol=0, rtol=0)
    prompts, responses = list(rows["prompt_ids"]), [pair[0] for pair in rows["responses_ids"]]
    with attached_adapter(load_policy(settings), tmp_path / "adapter") as attached:
        assert isinstance(attached, PeftModel)
        expected, _ = response_logps(attached, prompts, responses, pad_id=0, batch_size=8)
    found, _ = response_logps(merged, prompts, responses, pad_id=0, batch_size=8)
    without, _ = response_logps(policy.model, prompts, responses, pad_id=0, batch_size=8)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert abs(found - without).max() > 0.1
