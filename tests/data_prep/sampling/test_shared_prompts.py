"""A prompt asked for several responses is computed once: the draws are those of every row alone,
and repeated answers cost one forward."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TemperatureLogitsWarper, TopPLogitsWarper

from data_prep.models.policy import Policy
from data_prep.models.settings import PolicySettings
from data_prep.sampling import logprobs
from data_prep.sampling.decoding import COMPACTED_AT, inverse_cdf
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


def quantiles(model, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Row by row without a cache: at each position the token at which the cumulated warped law
    passes that position's uniform number."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), SETTINGS.max_new_tokens)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
    warpers = TemperatureLogitsWarper(SETTINGS.temperature), TopPLogitsWarper(SETTINGS.top_p)
    rows = []
    for prompt, numbers in zip(prompts, uniforms, strict=True):
        row = []
        for number in numbers:
            logits = model(torch.tensor([prompt + row])).logits[:, -1]
            for warper in warpers:
                logits = warper(None, logits)
            row.append(int((logits.double().softmax(-1).cumsum(-1) <= number).sum()))
            if row[-1] == EOS:
                break
        rows.append(row)
    return rows


def policy_of(model) -> Policy:
    tokenizer = SimpleNamespace(pad_token_id=0)
    return Policy(model, tokenizer, PolicySettings(model="none"), (EOS,), "none", {})


# PEFT refuses Mamba's out_proj, which "all-linear" takes in.
PLAIN = [("llama", False), ("gemma3, window longer than a row", False), (RECURRENT, False)]
ADAPTED = [(name, True) for name in MODELS if name != RECURRENT]


@pytest.mark.parametrize(("name", "lora"), PLAIN + ADAPTED)
def test_draws_are_the_quantiles_of_the_law_row_by_row(name, lora):
    """With a prompt's responses side by side and rows that leave when they end; recurrent models
    keep more than keys and values, and `generate` draws."""
    model = model_of(MODELS[name], lora=lora)
    expected = plainly if name == RECURRENT else quantiles
    for lengths in ((9, 9), (11, 1, 6)):
        prompts = prompts_of(lengths, times=2)
        drawn = generate(policy_of(model), model, prompts, SETTINGS, seed=3)
        with torch.no_grad():
            assert drawn == expected(model, prompts, seed=3)


def test_rows_that_have_ended_leave_the_batch():
    model, widths = model_of(CONFIGS["llama"]), []
    count = lambda *a: widths.append(len(a[2]["input_ids"]))
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    prompts = prompts_of((6, 9), times=40)
    ends = tuple(range(5, 40))  # so many that most rows end at once
    policy = dataclasses.replace(policy_of(model), eos_ids=ends)
    drawn = generate(policy, model, prompts, SETTINGS, seed=3)
    hook.remove()
    lengths = np.array([len(row) for row in drawn])
    assert widths[0] == 2 and widths[1] < 80 and widths[-1] <= 16
    for step, width in enumerate(widths[1:], 1):
        assert (lengths > step).sum() <= width <= (lengths > step).sum() / COMPACTED_AT + 1


def test_a_token_of_probability_zero_is_never_drawn():
    law = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]] * 4)
    uniforms = torch.tensor([0.0, 0.3 - 1e-9, 0.3 + 1e-6, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(law, uniforms).tolist() == [1, 1, 3, 3]


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
    assert max(rows) <= 5 and 16 <= sum(rows) <= 16 + 2 * 4  # prompts are read beside them
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
