"""The path KL: Σ_t of both next-token laws' KL, against enumeration of a tiny model's responses."""

from itertools import product

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from data_prep.sampling.logprobs import sampled_logps
from tests.helpers.families import CONFIGS, VOCABULARY, model_of

PROMPT = [5, 9, 3]


def adapted_model():
    """A tiny Llama with an adapter that changes it visibly."""
    model = get_peft_model(model_of(CONFIGS["llama"]), LoraConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def test_the_mean_of_the_path_kl_over_all_responses_is_the_kl():
    """All 97² responses of two tokens: both log π_θ/π_ref and path_kl have the KL as their mean,
    and path_kl varies less."""
    model = adapted_model()
    responses = [list(pair) for pair in product(range(VOCABULARY), repeat=2)]
    prompts = [PROMPT] * len(responses)
    logps = sampled_logps(
        model, prompts, responses, pad_id=0, batch_size=2048, reference=model.disable_adapter
    )
    law, ratio = np.exp(logps.policy), logps.policy - logps.ref
    assert abs(law.sum() - 1) < 1e-5
    kl = law @ ratio
    assert kl > 0.02
    np.testing.assert_allclose(law @ logps.path_kl, kl, rtol=1e-4)
    spread = [law @ (values - kl) ** 2 for values in (ratio, logps.path_kl)]
    assert spread[1] < 0.4 * spread[0]


def test_each_prefix_adds_the_kl_of_its_two_laws():
    model, response = adapted_model(), [7, 2, 40]
    logps = sampled_logps(
        model, [PROMPT], [response], pad_id=0, batch_size=4, reference=model.disable_adapter
    )
    steps = []
    with torch.no_grad():
        for law in (model.disable_adapter, None):
            tokens = torch.tensor([PROMPT + response])
            if law is None:
                logits = model(tokens).logits
            else:
                with law():
                    logits = model(tokens).logits
            steps.append(logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1))
    ref, policy = steps
    by_hand = (policy.exp() * (policy - ref)).sum()
    np.testing.assert_allclose(logps.path_kl[0], by_hand.item(), rtol=1e-4)
    chosen = torch.tensor(response)[:, None]
    np.testing.assert_allclose(logps.ref[0], ref.gather(1, chosen).sum().item(), rtol=1e-4)


def test_without_an_adapter_there_is_no_divergence():
    model = adapted_model()
    logps = sampled_logps(model, [PROMPT], [[7, 2]], pad_id=0, batch_size=4)
    assert (logps.ref == logps.policy).all() and logps.path_kl.tolist() == [0.0]
