"""Padding, EOS, windows, named templates, and control tokens that a user typed."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.models.tokens import as_text, encode, encode_pair, window_of
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.templates import lacking_template, rendered_prompts
from data_prep.sampling.logprobs import response_logps
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.scoring import make_scorer
from tests.helpers.models import save_tiny_causal_lm

PROMPTS, RESPONSES = [[5, 6, 7], [8]], [[11, 12, 2], [13]]


def policy(folder):
    return load_policy(PolicySettings(model=str(folder), quantization="none", dtype="float32"))


def change(path, **facts):
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= facts
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("tokens", [{"pad_token": "[PAD]"}, {"pad_token": None}])
def test_padding_that_the_model_does_not_embed_changes_nothing(tokens, tmp_path):
    save_tiny_causal_lm(tmp_path)
    expected = [
        response_logps(policy(tmp_path).model, [p], [r], pad_id=3, batch_size=1)[0]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if tokens["pad_token"]:
        tokenizer.add_special_tokens(tokens)
        tokenizer.save_pretrained(tmp_path)
    else:
        change(tmp_path / "tokenizer_config.json", pad_token=None, eos_token=None)
    loaded = policy(tmp_path)
    pad = loaded.tokenizer.pad_token_id
    assert pad == 2 == loaded.eos_ids[0]
    found = response_logps(loaded.model, PROMPTS, RESPONSES, pad_id=pad, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_eos_that_the_model_does_not_know_is_left_out_or_refused(tmp_path):
    save_tiny_causal_lm(tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=[2, 999])
    assert policy(tmp_path).eos_ids == (2,)
    change(tmp_path / "generation_config.json", eos_token_id=999)
    change(tmp_path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r"EOS token \(999\) lies outside .* vocabulary of 64"):
        policy(tmp_path)


def test_named_templates_need_a_default(tmp_path):
    save_tiny_causal_lm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = PromptSettings(source="none", format="chat")
    prompt = json.dumps([{"role": "user", "content": "w1"}])
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and none"):
        rendered_prompts([prompt], chat, tokenizer)
    tokenizer.chat_template = {"rag": "x", "default": "{{ messages[0]['content'] }}"}
    assert rendered_prompts([prompt], chat, tokenizer) == ["w1"] and not lacking_template(tokenizer)


SMALL = {
    "vocab_size": 260,
    "num_labels": 1,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def roberta(positions):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return RobertaForSequenceClassification(
        RobertaConfig(**SMALL, **size, intermediate_size=16, max_position_embeddings=positions)
    )


def bart():
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": number
        for side in ("encoder", "decoder")
        for name, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    return BartForSequenceClassification(
        BartConfig(**SMALL, **sides, d_model=16, max_position_embeddings=60)
    )


KIN = {
    "XLMRoberta": {},
    "Camembert": {},
    "MPNet": {},
    "Data2VecText": {},
    "Longformer": {"attention_window": 4},
}


@pytest.mark.parametrize("name", KIN)
def test_models_whose_positions_begin_behind_the_padding(name):
    config = getattr(transformers, f"{name}Config")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "max_position_embeddings": 24} | SMALL | KIN[name]
    model = getattr(transformers, f"{name}ForSequenceClassification")(config(**size)).eval()
    window = window_of(model)
    model(torch.tensor([[5] * (window - 1) + [2]]))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[5] * window + [2]]))


def test_windows_are_what_the_positions_hold():
    """RoBERTa's begin behind the padding index; BART's table is longer than its window."""
    for model, window in ((roberta(24), 20), (bart(), 60)):
        assert window_of(model) == window
        model.eval()(torch.tensor([[5] * (window - 1) + [2]]))


def save_letters(folder):
    """A tokenizer of single bytes with control tokens beside them."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def scorer(folder, model, **keys):
    save_letters(folder)
    model.save_pretrained(folder)
    return make_scorer(ClassifierScorerSettings(type="classifier", model=str(folder), **keys))


@pytest.mark.parametrize("layout", ["pair", "template"])
def test_a_typed_eos_is_text_to_a_model_that_counts_it(layout, tmp_path):
    template = "ask {prompt} say {response}</s>" if layout == "template" else None
    keys = {"text": layout, "template": template, "append_eos": layout == "pair"}
    judge = scorer(tmp_path, bart(), **keys)
    responses = ["a b", "a </s> b", "</s>"]
    assert np.isfinite(judge.score(["a"] * 3, responses)).all()
    eos = judge.tokenizer.eos_token_id
    for response in responses:
        assert judge._encode("a </s>", response)["input_ids"].count(eos) == 1


def test_control_tokens_of_a_user_are_characters_and_the_templates_own_are_control(tmp_path):
    save_letters(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    typed = tokenizer("a</s>b", add_special_tokens=False, split_special_tokens=True).input_ids
    b = tokenizer("b", add_special_tokens=False).input_ids
    assert len(typed) == 6
    marked = as_text(tokenizer, "a</s>b")
    assert encode(tokenizer, "a</s>b")["input_ids"] == tokenizer("a</s>b").input_ids
    assert encode(tokenizer, f"{marked}</s>")["input_ids"] == [1, *typed, 2]
    assert encode_pair(tokenizer, marked, "b")["input_ids"] == [1, *typed, 1, *b]
    assert encode_pair(tokenizer, marked, "b", room=5)["input_ids"] == [1, *typed[-2:], 1, *b]
