"""Implicit scorers: β·log-ratio of the sampled tokens against plain torch and PEFT, and who is
refused."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.prompts.settings import PromptSettings
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.implicit import PolicyHandle
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.scoring import make_scorer, score_tokens
from data_prep.scorers.settings import ImplicitScorerSettings
from tests.helpers.models import save_adapter, save_tiny_causal_lm, save_word_tokenizer

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, 12, 2], [13, 14, 15, 16], [17, 2]]
BETA = 0.1


def implicit(handle, **keys):
    return make_scorer(
        ImplicitScorerSettings(**({"type": "implicit", "beta": BETA} | keys)), handle
    )


def plain_logps(model) -> np.ndarray:
    """log π(response | prompt), each alone, token by token, in float64 sums."""
    values = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            steps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        tokens = enumerate(response)
        values.append(sum(steps[len(prompt) + k - 1, token].item() for k, token in tokens))
    return np.array(values)


def plain(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


@pytest.fixture(scope="module")
def reference_logps(base) -> np.ndarray:
    return plain_logps(plain(base))


@pytest.fixture(scope="module")
def adapter_logps(base, adapter) -> np.ndarray:
    return plain_logps(plain(base, adapter))


def test_an_adapters_score_is_beta_times_the_log_ratio(
    adapter, handle, reference_logps, adapter_logps
):
    expected = BETA * (adapter_logps - reference_logps)
    assert np.ptp(expected) > 0.01
    for batch_size in (1, 16):
        scorer = implicit(handle, adapter=str(adapter), batch_size=batch_size)
        scores = scorer.score_tokens(PROMPTS, RESPONSES, None)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    policy = handle.load().model
    assert scorer.loaded == [] and not any("lora" in name for name, _ in policy.named_modules())


def test_stored_reference_log_probabilities_are_taken_and_unknown_ones_computed(
    adapter, handle, reference_logps, adapter_logps
):
    stored = np.array([-20.0, np.nan, -30.0])
    reference = np.where(np.isnan(stored), reference_logps, stored)
    scores = implicit(handle, adapter=str(adapter)).score_tokens(PROMPTS, RESPONSES, stored)
    np.testing.assert_allclose(scores, BETA * (adapter_logps - reference), atol=1e-5)


def test_a_model_and_a_reference_beside_the_policy(handle, reference_logps, tmp_path):
    """A whole model beside the recipe's reference; and an adapter on a base that is not the
    recipe's, once it is named."""
    other = save_tiny_causal_lm(tmp_path / "other", seed=1)
    scorer = implicit(handle, model=str(other))
    other_logps = plain_logps(plain(other))
    scores = scorer.score_tokens(PROMPTS, RESPONSES, None)
    np.testing.assert_allclose(scores, BETA * (other_logps - reference_logps), atol=1e-5)
    policy = handle.load()
    assert scorer.reference_fingerprint == policy.fingerprint and len(scorer.loaded) == 1
    elsewhere = save_adapter(other, tmp_path / "elsewhere")
    wrong_base = r"was trained on .*other, not on .*; set reference to that base"
    with pytest.raises(UserError, match=wrong_base):
        implicit(handle, adapter=str(elsewhere))
    scorer = implicit(handle, adapter=str(elsewhere), reference=str(other))
    scores = scorer.score_tokens(PROMPTS, RESPONSES, None)
    expected = BETA * (plain_logps(plain(other, elsewhere)) - other_logps)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scorer.reference_fingerprint != policy.fingerprint


def test_what_does_not_belong_to_the_policy_is_refused(base, adapter, handle, tmp_path):
    stranger = save_tiny_causal_lm(tmp_path / "stranger")
    save_word_tokenizer(stranger, " ".join(f"v{i}" for i in range(60)))
    foreign = r"stranger does not read the policy's tokens \(e\.g\. 'w"
    with pytest.raises(UserError, match=foreign):
        implicit(handle, model=str(stranger))
    wide = save_adapter(save_tiny_causal_lm(tmp_path / "wide", width=48), tmp_path / "wide_adapter")
    config = json.loads((wide / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (wide / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of another base, or damaged"):
        implicit(handle, adapter=str(wide))
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        implicit(handle, adapter=str(base))
    alone = "asks the recipe's policy; use it in a recipe or with `cdpo evaluate"
    with pytest.raises(UserError, match=alone):
        make_scorer(ImplicitScorerSettings(type="implicit", beta=BETA, adapter=str(adapter)))
    with pytest.raises(UserError, match="have 66 tokens, over its window of 64"):
        implicit(handle, adapter=str(adapter)).score_tokens([[5] * 60], [[6] * 6], None)


@pytest.mark.parametrize("key", ["threshold", "indicator", "clip"])
def test_levels_are_refused_because_log_z_is_unknown(key):
    block = {"type": "implicit", "beta": 0.1, "adapter": "a"}
    refusal = f"{key}: .*β log Z.*level of a score means nothing; give a margin"
    with pytest.raises(ValueError, match=refusal):
        ImplicitScorerSettings(**block, **{key: 1.0})
    resolved = ImplicitScorerSettings(**block).model_dump()  # holds every default
    assert ImplicitScorerSettings(**resolved).model_dump() == resolved


def test_texts_are_tokenized_as_the_recipe_says(adapter, handle):
    """The template's BOS in front, EOS behind unless the response is as long as one that was cut
    off."""
    scorer = implicit(handle, adapter=str(adapter))
    texts = ["w2 w3", "w4"], ["w5", "w6 w7 w8 w9"]
    prompts, responses = scorer.tokenize(*texts)
    decode = handle.load().tokenizer.decode
    assert [decode(ids) for ids in prompts] == ["<s> w1 w2 w3", "<s> w1 w4"]
    assert [decode(ids) for ids in responses] == ["w5 </s>", "w6 w7 w8 w9"]
    by_tokens = scorer.score_tokens(prompts, responses, None)
    np.testing.assert_array_equal(scorer.score(*texts), by_tokens)
    chat = r"a prompt is a list of messages, but prompts\.format is text"
    with pytest.raises(UserError, match=chat):
        scorer.tokenize([[{"role": "user", "content": "w2"}]], ["w5"])


def test_a_chat_answer_is_closed_by_its_templates_turn_end(adapter, handle):
    """The template ends a turn with w59, which the policy stops at, not with EOS."""
    policy = handle.load()
    end = policy.tokenizer.convert_tokens_to_ids("w59")
    tokenizer = copy.deepcopy(policy.tokenizer)
    chat = dataclasses.replace(policy, tokenizer=tokenizer, eos_ids=(*policy.eos_ids, end))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} w59 {% endfor %}"
        "{% if add_generation_prompt %}w1{% endif %}"
    )
    settings = PromptSettings(source="none", format="chat")
    scorer = implicit(PolicyHandle(lambda: chat, settings, max_new_tokens=4), adapter=str(adapter))
    _, responses = scorer.tokenize(["w2"], ["w5"])
    assert tokenizer.decode(responses[0]) == "w5 w59"


def test_the_cache_goes_by_tokens_and_one_weight_is_another_scorer(adapter, handle, tmp_path):
    """Two token sequences of one text are two responses; the cache gives back the first score; a
    changed adapter scores anew."""
    copy = shutil.copytree(adapter, tmp_path / "copy")
    cache = ScoreCache(tmp_path / "scores.sqlite")

    def scores(scorer, ref_logp=None, negate=False):
        options = ScorerOptions(negate=negate)
        how = {"texts": ["same text"] * 2, "ref_logp": ref_logp, "options": options}
        tokens = [[5, 6]] * 2, [[11, 2], [12, 2]]
        return score_tokens(scorer, *tokens, name="g", cache=cache, **how)

    scorer = implicit(handle, adapter=str(copy))
    first = scores(scorer)
    assert first[0] != first[1]
    # Nothing is computed again.
    np.testing.assert_array_equal(scores(scorer, ref_logp=np.zeros(2), negate=True), -first)
    other_batches = implicit(handle, adapter=str(copy), batch_size=1, calibrate="x.csv")
    assert other_batches.fingerprint == scorer.fingerprint
    weights = load_file(copy / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 0.1
    save_file(weights, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    changed = implicit(handle, adapter=str(copy))
    assert changed.fingerprint != scorer.fingerprint and not np.allclose(scores(changed), first)
    assert implicit(handle, adapter=str(copy), beta=0.2).fingerprint != changed.fingerprint
