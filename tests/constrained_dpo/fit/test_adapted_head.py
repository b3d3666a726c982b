"""An adapter on the language-model head too: trained in both layouts, saved without the base's
weights, merged where weights are tied."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from data_prep.models.adapters import attached_adapter, merge_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import LoraSettings, PolicySettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import built_trainer, fit_log, make_pool, ragged_rows
from tests.helpers.models import save_tiny_causal_lm

HEAD = LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj", "lm_head"])
BETA = 0.3


def randomize(trainer) -> None:
    """Moves the adapter away from π_ref."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def loss_by_hand(model, rows) -> torch.Tensor:
    """Of hard labels, by the model's own logits."""
    losses = []
    for row in rows:
        ratios = []
        for response, ref_logp in zip(row["responses_ids"], row["ref_logps"], strict=True):
            logits = model(torch.tensor([row["prompt_ids"] + response])).logits[0]
            logps = logits[len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            ratios.append(logps.gather(1, torch.tensor(response)[:, None]).sum() - ref_logp)
        losses.append(-torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_are_those_of_the_models_own_logits(plain_policy, shared, tmp_path):
    """TRL's fused head reads the head's weight alone: with it the loss would be another and lora_B
    of the head would never move."""
    policy, rows = copy.deepcopy(plain_policy), ragged_rows(plain_policy, 6, seed=0)
    settings = {"batch_size": 6, "shared_prompts": shared}
    with built_trainer(policy, rows, tmp_path, lora=HEAD, beta=BETA, **settings) as trainer:
        assert trainer.adapted_head and (trainer.padded_because is None) == shared
        randomize(trainer)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator(list(rows))).backward()
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        trainer.model.zero_grad()
        loss_by_hand(trainer.model, rows).backward()
    heads = [name for name in trained if "lm_head" in name]
    assert len(heads) == 2 and all(trained[name].grad.abs().max() > 1e-4 for name in heads)
    for name, parameter in trained.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_the_adapter_holds_no_weights_of_the_base_and_goes_on_from_itself(
    quickstart_policy, tmp_path
):
    pool, files = make_pool(quickstart_policy), []
    for name in ("first", "second"):
        previous = files[-1].parent if files else None
        settings = {"lora": HEAD, "previous": previous, "learning_rate": 5e-3}
        fit_log(quickstart_policy, pool, tmp_path / name, **settings)
        files.append(tmp_path / name / "adapter" / "adapter_model.safetensors")
    first, second = map(load_file, files)
    assert all(".lora_A." in name or ".lora_B." in name for name in second)
    moved = [(second[n] - first[n]).abs().max() for n in second if "lm_head" in n]
    assert len(moved) == 2 and min(moved) > 1e-4


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
    with built_trainer(policy, rows, tmp_path / "fit", lora=HEAD, beta=BETA) as trainer:
        randomize(trainer)
        trainer.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_adapter(settings, str(base), tmp_path / "adapter", tmp_path / "merged", "test")
    merged, plain = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (tmp_path / "merged", base)
    )
    embeddings = (model.get_input_embeddings().weight for model in (merged, plain))
    torch.testing.assert_close(*embeddings, atol=0, rtol=0)
    texts = list(rows["prompt_ids"]), [pair[0] for pair in rows["responses_ids"]]
    with attached_adapter(load_policy(settings), tmp_path / "adapter") as attached:
        assert isinstance(attached, PeftModel)
        expected = response_logps(attached, *texts, pad_id=0, batch_size=8)
    logps = response_logps(merged, *texts, pad_id=0, batch_size=8)
    without = response_logps(policy.model, *texts, pad_id=0, batch_size=8)
    torch.testing.assert_close(torch.tensor(logps), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert abs(logps - without).max() > 0.1
