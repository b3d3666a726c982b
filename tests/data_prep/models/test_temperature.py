"""policy.temperature: the tempered model is the policy. What is sampled and measured are the plain
model's own logits over T, by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.models.temperature import untempered
from data_prep.sampling.enumeration import enumerate_responses, exact_logps
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import SamplingSettings
from data_prep.sampling.logprobs import response_logps

T, LENGTH, PROMPT = 0.7, 3, "please hurt cat"


@pytest.fixture(scope="module")
def tempered():
    """`plain_policy` at T = 0.7."""
    settings = PolicySettings(
        model="quickstart", quantization="none", dtype="float32", temperature=T
    )
    return load_policy(settings)


@pytest.fixture(scope="module")
def world(plain_policy):
    """(prompt's tokens, every answer, log softmax(logits/T) of each by the plain model)."""
    prompt = plain_policy.tokenizer(PROMPT)["input_ids"]
    size, (eos,) = plain_policy.model.config.vocab_size, plain_policy.eos_ids
    answers = enumerate_responses(eos, size, LENGTH)
    full = torch.tensor([prompt + (ids + [eos] * LENGTH)[:LENGTH] for ids in answers])
    with torch.no_grad():
        logits = torch.cat([plain_policy.model(rows).logits for rows in full.split(4000)])
    steps = (logits[:, len(prompt) - 1 : -1].double() / T).log_softmax(-1)
    chosen = steps.gather(2, full[:, len(prompt) :, None])[..., 0]
    lengths = torch.tensor([len(ids) for ids in answers])
    present = torch.arange(LENGTH) < lengths[:, None]
    return prompt, answers, (chosen * present).sum(1).numpy()


def test_every_way_to_a_log_probability_is_that_of_the_logits_over_t(tempered, world):
    prompt, answers, expected = world
    assert abs(np.exp(expected).sum() - 1) < 1e-6
    exact = exact_logps(tempered, None, {"x": prompt}, LENGTH)[0]
    np.testing.assert_allclose(exact, expected, atol=2e-5)
    some = np.random.default_rng(0).choice(len(answers), 500, replace=False)
    rows = [prompt] * len(some), [answers[i] for i in some]
    logps = response_logps(tempered.model, *rows, pad_id=0, batch_size=128)
    np.testing.assert_allclose(logps, expected[some], atol=2e-5)


def test_samples_are_drawn_from_the_tempered_policy_and_are_its_own(tempered, world):
    """4,000 draws: the surprisal's mean is the entropy, which at T = 1 is far away; no law beside
    the policy's."""
    prompt, _, expected = world
    settings = SamplingSettings(max_new_tokens=LENGTH, batch_size=1000)
    drawn = Sampler(tempered, {"x": prompt}, settings).draw(
        pd.DataFrame({"prompt_id": ["x"]}),
        responses_per_prompt=4000,
        adapter=None,
        source="reference",
        seed=1,
    )
    law = np.exp(expected)
    entropy, spread = -law @ expected, np.sqrt(law @ expected**2 - (law @ expected) ** 2)
    surprisal = -drawn["policy_logp"]
    assert abs(surprisal.mean() - entropy) < 4 * spread / np.sqrt(len(drawn))
    assert (drawn["sample_logp"] == drawn["policy_logp"]).all()
    assert (drawn["ref_logp"] == drawn["policy_logp"]).all()


def test_a_relative_temperature_divides_once_more(tempered, plain_policy, world):
    """Drawn at sampling.temperature 2 from the policy at 0.7: the plain model at 1.4."""
    prompt, answers, _ = world
    prompts, drawn = [prompt] * 20, answers[100:120]
    tables = [
        Sampler(policy, {}, SamplingSettings(max_new_tokens=LENGTH, temperature=t)).logps(
            policy.model, prompts, drawn, None
        )
        for policy, t in ((tempered, 2.0), (plain_policy, 2.0 * T))
    ]
    np.testing.assert_allclose(tables[0].sample, tables[1].sample, atol=2e-5)
    assert np.abs(tables[0].policy - tables[1].policy).max() > 0.1


def test_untempered_it_is_the_plain_model_and_its_fingerprint_another(
    tempered, plain_policy, world
):
    prompt, answers, _ = world
    rows = [prompt] * 20, answers[100:120]
    with untempered(tempered.model):
        logps = response_logps(tempered.model, *rows, pad_id=0, batch_size=20)
    plain = response_logps(plain_policy.model, *rows, pad_id=0, batch_size=20)
    np.testing.assert_array_equal(logps, plain)
    assert tempered.fingerprint != plain_policy.fingerprint
