"""A prompt asked for several responses is computed once: the draws are plain transformers' own, and
repeated answers cost one forward."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from data_prep.models.policy import Policy
from data_prep.models.settings import PolicySettings
from data_prep.sampling import generate as sampling
from data_prep.sampling import logprobs
from data_prep.sampling.draws import DrawLaw
from data_prep.sampling.generate import generate
from data_prep.sampling.law import SamplingSettings, generation_arguments
from data_prep.sampling.logprobs import sampled_logps
from tests.helpers.families import CONFIGS, REFUSED, VOCABULARY, model_of

EOS = 5
RECURRENT = "mamba, recurrent"
MODELS = CONFIGS | {name: config for name, (config, _) in REFUSED.items()}
SETTINGS = SamplingSettings(max_new_tokens=8, temperature=1.2, top_p=0.95)


def prompts_of(lengths: tuple[int, ...], times: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [prompt for n in lengths for prompt in [rng.integers(6, VOCABULARY, n).tolist()] * times]


def plainly(model, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Every row's prompt padded on the left and given to the model's own `generate`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    torch.manual_seed(seed)
    config = GenerationConfig(**generation_arguments(SETTINGS, (EOS,), 0))
    drawn = model.generate(ids, attention_mask=(ids != 0).long(), generation_config=config)[
        :, width:
    ].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in drawn]


def policy_of(model) -> Policy:
    tokenizer = SimpleNamespace(pad_token_id=0)
    return Policy(model, tokenizer, PolicySettings(model="none"), (EOS,), "none", {})


# PEFT refuses Mamba's out_proj, which "all-linear" takes in.
PLAIN = [("llama", False), ("gemma3, window longer than a row", False), (RECURRENT, False)]
ADAPTED = [(name, True) for name in MODELS if name != RECURRENT]


@pytest.mark.parametrize(("name", "lora"), PLAIN + ADAPTED)
def test_draws_are_those_of_plain_generate(name, lora, monkeypatch):
    model = model_of(MODELS[name], lora=lora)
    policy, caches, prompt_cache = policy_of(model), [], sampling._prompt_cache

    def recorded(*arguments):
        caches.append(prompt_cache(*arguments))
        return caches[-1]

    monkeypatch.setattr(sampling, "_prompt_cache", recorded)
    for lengths in ((9, 9), (11, 1, 6)):
        prompts = prompts_of(lengths, times=4)
        assert generate(policy, model, prompts, SETTINGS, seed=3) == plainly(model, prompts, seed=3)
    assert [cache is None for cache in caches] == [name == RECURRENT] * 2


def test_a_prompt_of_one_response_needs_no_cache_of_its_own(monkeypatch):
    model = model_of(CONFIGS["llama"])
    policy = policy_of(model)
    monkeypatch.delattr(sampling, "_prompt_cache")
    for prompts in (prompts_of((4, 7, 2), times=1), prompts_of((1,), times=5)):
        assert generate(policy, model, prompts, SETTINGS, seed=3) == plainly(model, prompts, seed=3)


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, logprobs.LOGITS_AT_ONCE])
def test_log_probabilities_of_repeated_responses_and_in_pieces(at_once, monkeypatch):
    """Against every response alone; a response that occurs five times goes through the model
    once."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
    model = model_of(CONFIGS["gemma"])
    rng = np.random.default_rng(2)
    prompts = prompts_of((3, 8), times=10)
    responses = [rng.integers(1, VOCABULARY, n).tolist() for n in rng.integers(1, 7, 20)]
    responses[4:8] = [responses[3]] * 4
    responses[12] = responses[3]  # to another prompt
    rows = []
    count = lambda *a: rows.append(len(a[2]["input_ids"]))
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    law = DrawLaw(temperature=0.7, top_p=0.9)
    logps = sampled_logps(model, prompts, responses, pad_id=0, batch_size=5, law=law)
    plain, warped = logps.policy, logps.sample
    assert (logps.ref == plain).all() and (logps.path_kl == 0).all()
    assert sum(rows) == 16 and max(rows) <= 5
    hook.remove()
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0]
        steps, chosen = logits[len(prompt) - 1 : -1].double(), torch.tensor(response)[:, None]
        log_probability = lambda law, chosen=chosen: law.log_softmax(-1).gather(1, chosen).sum()
        assert plain[i] == pytest.approx(log_probability(steps).item(), abs=1e-4)
        cold = steps / 0.7
        order = cold.sort(dim=-1, descending=True)
        # A token stays while less than top_p lies before it.
        before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
        kept = torch.zeros_like(cold, dtype=torch.bool).scatter(1, order.indices, before < 0.9)
        inside = log_probability(cold.masked_fill(~kept, -torch.inf))
        assert warped[i] == pytest.approx(inside.item(), abs=1e-4)
