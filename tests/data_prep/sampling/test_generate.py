"""The sampling law: exact on the enumerated world, complete against a checkpoint's own generation
settings (DESIGN invariant 8)."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.quickstart import PROMPTS, VOCABULARY
from data_prep.sampling.enumeration import enumerate_responses, exact_logps
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import SamplingSettings, check_lengths, is_policy_law, law_hash
from data_prep.sampling.logprobs import response_logps
from tests.helpers.models import tiny_adapter


def prompt_table(policy, count: int) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """Prompts of the embedded world and their tokens."""
    prompts = PROMPTS["train"][:count]
    tokens = {prompt: policy.tokenizer(prompt)["input_ids"] for prompt in prompts}
    return pd.DataFrame({"prompt_id": prompts, "prompt": prompts}), tokens


@pytest.mark.parametrize("adapted", [False, True])
def test_probabilities_of_all_responses_sum_to_one_and_are_the_samplers(
    quickstart_policy, tmp_path, adapted
):
    policy = quickstart_policy
    adapter = tiny_adapter(policy, tmp_path / "a") if adapted else None
    table, tokens = prompt_table(policy, 2)
    logp = exact_logps(policy, adapter, tokens)
    np.testing.assert_allclose(np.exp(logp).sum(axis=1), 1.0, atol=1e-5)
    sequences = enumerate_responses(policy.eos_ids[0], len(VOCABULARY))
    assert logp.shape == (2, len(sequences)) and len(set(map(tuple, sequences))) == len(sequences)
    with attached_adapter(policy, adapter) as model:
        # Sequences as they are, without the cache that the enumeration grows its tree from.
        listed, prompt = sequences[::40], tokens[table["prompt_id"][0]]
        prompts, pad_id = [prompt] * len(listed), policy.tokenizer.pad_token_id
        whole = response_logps(model, prompts, listed, pad_id=pad_id, batch_size=1024)
    np.testing.assert_allclose(logp[0, ::40], whole, atol=1e-4)

    drawn = Sampler(policy, tokens, SamplingSettings(max_new_tokens=3, batch_size=3000)).draw(
        table, responses_per_prompt=1500, adapter=adapter, source="reference", seed=5
    )
    position = {tuple(s): i for i, s in enumerate(sequences)}
    for row, prompt_id in enumerate(table["prompt_id"]):
        responses = drawn[drawn["prompt_id"] == prompt_id]
        where = np.array([position[tuple(ids)] for ids in responses["token_ids"]])
        np.testing.assert_allclose(responses["policy_logp"], logp[row, where], atol=2e-4)
        counts = np.bincount(where, minlength=len(sequences))
        likely = np.argsort(-logp[row])[:50]
        expected = np.exp(logp[row, likely]) * len(responses)
        assert (np.abs(counts[likely] - expected) < 5 * np.sqrt(expected) + 2).all()
        # The entropy: a truncated law (top_k) would sample from too few responses.
        entropy = -(np.exp(logp[row]) * logp[row]).sum()
        se = responses["policy_logp"].std() / np.sqrt(len(responses))
        assert abs(-responses["policy_logp"].mean() - entropy) < 5 * se
    if adapted:
        assert (drawn["policy_logp"] - drawn["ref_logp"]).abs().max() > 0.05
    else:
        np.testing.assert_array_equal(drawn["policy_logp"], drawn["ref_logp"])
    assert (drawn["ended"] == drawn["token_ids"].map(lambda ids: ids[-1] in policy.eos_ids)).all()


@pytest.mark.parametrize("length", [1, 2])
def test_shorter_answers_are_those_of_the_world_that_are_cut_there(quickstart_policy, length):
    policy, vocabulary = quickstart_policy, len(VOCABULARY)
    _, tokens = prompt_table(policy, 2)
    cut = exact_logps(policy, None, tokens, length)
    sequences = enumerate_responses(policy.eos_ids[0], vocabulary, length)
    whole = dict.fromkeys(map(tuple, sequences), 0.0)
    for ids, share in zip(
        enumerate_responses(policy.eos_ids[0], vocabulary),
        np.exp(exact_logps(policy, None, tokens))[0],
        strict=True,
    ):
        whole[tuple(ids[:length])] += share
    np.testing.assert_allclose(np.exp(cut[0]), list(whole.values()), atol=1e-6)


@pytest.fixture(scope="module")
def big_vocabulary_model(tmp_path_factory):
    """4,000 words, with top_k 20, min_p 0.9, repetition_penalty 1.3 and temperature 0.5 in the
    checkpoint's own generation_config."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("big")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(4000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4000,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=1,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=20,
        min_p=0.9,
        repetition_penalty=1.3,
        temperature=0.5,
        eos_token_id=1,
        pad_token_id=0,
    )
    model.save_pretrained(folder)
    return folder


def test_the_checkpoints_own_generation_settings_do_not_enter(big_vocabulary_model):
    policy = load_policy(
        PolicySettings(model=str(big_vocabulary_model), quantization="none", dtype="float32")
    )
    assert policy.overridden == {
        "top_k": 20,
        "min_p": 0.9,
        "repetition_penalty": 1.3,
        "temperature": 0.5,
    }
    table = pd.DataFrame({"prompt_id": ["a"], "prompt": ["w5 w6"]})
    settings = SamplingSettings(max_new_tokens=1, batch_size=2000)
    drawn = Sampler(policy, {"a": [5, 6]}, settings).draw(
        table, responses_per_prompt=2000, adapter=None, source="reference", seed=1
    )
    first = drawn["token_ids"].map(lambda ids: ids[0])
    with torch.no_grad():
        law = policy.model(torch.tensor([[5, 6]])).logits[0, -1].double().log_softmax(-1).numpy()
    top = np.argsort(-law)[:50]
    share = np.exp(law[top]).sum()
    assert share < 0.5, "the test needs a flat distribution"
    assert abs(first.isin(top).mean() - share) < 5 * np.sqrt(share * (1 - share) / 2000)
    surprise = -law[first.to_numpy()]
    assert abs(surprise.mean() + (np.exp(law) * law).sum()) < 5 * surprise.std() / np.sqrt(2000)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.8), (1.3, 0.9)])
def test_sample_logp_is_the_law_that_was_drawn_from(plain_policy, temperature, top_p):
    table, tokens = prompt_table(plain_policy, 1)
    settings = SamplingSettings(
        max_new_tokens=3, batch_size=5000, temperature=temperature, top_p=top_p
    )
    assert not is_policy_law(settings)
    drawn = Sampler(plain_policy, tokens, settings).draw(
        table, responses_per_prompt=5000, adapter=None, source="reference", seed=2
    )
    assert np.isfinite(drawn["sample_logp"]).all(), (
        "a sampled response lies outside the stated nucleus"
    )
    by_response = drawn.groupby(drawn["token_ids"].map(tuple))["sample_logp"]
    frequent = by_response.agg(["size", "first"]).query("size > 50")
    expected = np.exp(frequent["first"]) * len(drawn)
    assert len(frequent) > 10
    assert (np.abs(frequent["size"] - expected) < 5 * np.sqrt(expected)).all()


def test_a_shard_is_a_pure_function_of_its_seed(plain_policy):
    table, tokens = prompt_table(plain_policy, 2)
    sampler = Sampler(plain_policy, tokens, SamplingSettings(max_new_tokens=3, batch_size=8))

    def draw(seed):
        return sampler.draw(table, responses_per_prompt=8, adapter=None, source="s", seed=seed)

    torch.manual_seed(1)
    first = draw(3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert first.drop(columns="token_ids").equals(draw(3).drop(columns="token_ids"))
    assert not first["response"].equals(draw(4)["response"])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "sampling moved the global generator"


def test_log_probabilities_do_not_depend_on_batch_or_padding(plain_policy):
    model, rng = plain_policy.model, np.random.default_rng(0)
    prompts = [rng.integers(0, 30, rng.integers(1, 12)).tolist() for _ in range(24)]
    responses = [rng.integers(0, 30, rng.integers(1, 9)).tolist() for _ in range(24)]
    alone = response_logps(model, prompts, responses, pad_id=0, batch_size=1)
    together = response_logps(model, prompts, responses, pad_id=0, batch_size=16)
    np.testing.assert_allclose(alone, together, atol=1e-4)
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0] + responses[0]])).logits[0].log_softmax(-1)
    by_hand = sum(logits[len(prompts[0]) + i - 1, t].item() for i, t in enumerate(responses[0]))
    assert alone[0] == pytest.approx(by_hand, abs=1e-4)


def test_quantization_is_what_was_asked(quickstart_policy):
    import bitsandbytes as bnb

    layers = [m for m in quickstart_policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and {m.weight.quant_type for m in layers} == {"nf4"}
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    eight = load_policy(PolicySettings(model="quickstart", quantization="int8", dtype="float32"))
    assert sum(isinstance(m, bnb.nn.Linear8bitLt) for m in eight.model.modules()) == 14
    fingerprints = {
        load_policy(PolicySettings(model="quickstart", quantization=q, dtype="float32")).fingerprint
        for q in ("nf4", "none")
    }
    assert len(fingerprints) == 2


def test_attaching_an_adapter_leaves_the_base_as_it_was(quickstart_policy, tmp_path):
    adapter = tiny_adapter(quickstart_policy, tmp_path / "a")
    before = {k: v.clone() for k, v in quickstart_policy.model.state_dict().items()}
    with attached_adapter(quickstart_policy, adapter):
        pass
    after = quickstart_policy.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_long_prompts_and_unusable_models_are_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"prompts: 1 are longer than fit.max_length 8 − max_new_tokens 3 = 5 tokens, the "
        r"longest b with 6",
    ):
        check_lengths(
            {"a": [1] * 5, "b": [1] * 6}, SamplingSettings(max_new_tokens=3), 8, "fit.max_length"
        )
    with pytest.raises(UserError, match="is not a folder"):
        load_policy(PolicySettings(model="./nowhere"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_policy(PolicySettings(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no \\*\\.safetensors weights"):
        load_policy(PolicySettings(model=str(tmp_path)))


def test_law_hash_tells_laws_apart():
    hashes = {
        law_hash(SamplingSettings(**c), (0,))
        for c in ({}, {"temperature": 0.9}, {"top_p": 0.9}, {"max_new_tokens": 3})
    }
    assert len(hashes | {law_hash(SamplingSettings(), (0, 1))}) == 5
    assert law_hash(SamplingSettings(batch_size=7), (0,)) in hashes
