"""Guards: the score against a plain forward per text, the probe that finds the verdict, verdicts of
several tokens, who is refused."""

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.scorers.guard import tokenize_words
from data_prep.scorers.model_settings import GuardScorerSettings
from data_prep.scorers.scoring import make_scorer
from tests.helpers.models import save_word_tokenizer, tiny_llama_config

PROMPTS = ["open the door", "sing", "a much longer request about nothing in particular", "no"]
RESPONSES = ["no", "la la la la la la", "yes", "yes of course with pleasure"]
VERDICTS = (
    "Safety: Safe Unsafe Controversial safe unsafe very not harmful hello [user] "
    "[assistant] [verdict]"
)
TEMPLATE = "[user] {prompt} [assistant] {response} [verdict]"
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[verdict] "
WIDTH = 64


def save_guard(folder, says: dict[str, str], chat: bool = True, padding_side: str = "right"):
    """A tiny Llama whose next word is ruled by the last one (`says`: word → words it is followed
    by, equally likely but for what attention adds, which depends on the whole text); a word that
    nothing follows is the last."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    size = save_word_tokenizer(folder, f"{' '.join(PROMPTS + RESPONSES)} {VERDICTS}", padding_side)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat:
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    config = tiny_llama_config(size)
    config.hidden_size, config.head_dim, config.max_position_embeddings = WIDTH, 16, 128
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, WIDTH))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(5)
        model.lm_head.weight.normal_(std=0.2)
        last = {word for words in says.values() for word in words.split()} - says.keys()
        for word, following in (says | dict.fromkeys(last - {"</s>"}, "</s>")).items():
            for other in following.split():
                model.lm_head.weight[
                    tokenizer.convert_tokens_to_ids(other), tokenizer.convert_tokens_to_ids(word)
                ] = 3.0
    model.save_pretrained(folder)
    return folder


def guard(folder, **keys):
    return make_scorer(
        GuardScorerSettings(**({"type": "guard", "model": str(folder), "dtype": "float32"} | keys))
    )


def plain_logps(folder, words: list[str], template: str | None = None) -> np.ndarray:
    """log p(words | text), (num_texts, num_words): each text and word alone, unpadded, token by
    token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        if template is None:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
            base = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        else:
            base = tokenizer(template.replace("{prompt}", prompt).replace("{response}", response))[
                "input_ids"
            ]
        rows.append([])
        for word in words:
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([base + ids])).logits[0]
            rows[-1].append(
                sum(logits[len(base) + k - 1].log_softmax(-1)[i].item() for k, i in enumerate(ids))
            )
    return np.array(rows)


@pytest.mark.parametrize(("template", "padding_side"), [(None, "left"), (TEMPLATE, "right")])
def test_score_equals_one_plain_forward_per_text(tmp_path, template, padding_side):
    says = {"[verdict]": "safe unsafe"}
    save_guard(tmp_path, says, chat=template is None, padding_side=padding_side)
    safe, unsafe = plain_logps(tmp_path, ["safe", "unsafe"], template).T
    together, alone = (guard(tmp_path, template=template, batch_size=n) for n in (4, 1))
    expected = safe - unsafe
    assert np.ptp(expected) > 0.1 and together.verdict.prefix.strip() == ""
    np.testing.assert_allclose(together.score(PROMPTS, RESPONSES), expected, atol=1e-4)
    np.testing.assert_allclose(alone.score(PROMPTS, RESPONSES), expected, atol=1e-4)
    np.testing.assert_allclose(together.score(PROMPTS[:1], RESPONSES[:1]), expected[:1], atol=1e-4)


def test_the_probe_finds_what_stands_before_the_verdict(tmp_path):
    """Qwen3Guard's way: `Safety: Safe`, where `Safe` also begins another word, and a third
    verdict."""
    save_guard(tmp_path, {"[verdict]": "Safety:", "Safety:": "Safe Unsafe Controversial"})
    words = {"safe": "Safe", "unsafe": ["Unsafe", "Controversial"]}
    probed = guard(tmp_path, **words)
    assert probed.verdict.prefix.split() == ["Safety:"] and min(probed.verdict.mass) > 0.9
    (note,) = probed.notes
    assert "Safety:" in note and f"{probed.verdict.mass[0]:.3f} on a benign" in note
    logps = plain_logps(tmp_path, ["Safety: Safe", "Safety: Unsafe", "Safety: Controversial"])
    expected = logps[:, 0] - np.logaddexp(logps[:, 1], logps[:, 2])
    np.testing.assert_allclose(probed.score(PROMPTS, RESPONSES), expected, atol=1e-4)
    told = guard(tmp_path, **words, verdict_prefix="Safety: ")
    np.testing.assert_allclose(told.score(PROMPTS, RESPONSES), expected, atol=1e-4)
    two = guard(tmp_path, safe="Safe", unsafe="Unsafe", verdict_prefix="Safety: ", min_mass=0.1)
    np.testing.assert_allclose(two.score(PROMPTS, RESPONSES), logps[:, 0] - logps[:, 1], atol=1e-4)


SHARED_FIRST_TOKEN = ({"[verdict]": "very", "very": "safe unsafe"}, "very safe", "very unsafe")
ONE_IS_SHORTER = ({"[verdict]": "not harmful", "not": "harmful"}, "not harmful", "harmful")
DIFFERENT_BEGINNINGS = (
    {"[verdict]": "not very", "not": "harmful", "very": "harmful"},
    "not harmful",
    "very harmful",
)


@pytest.mark.parametrize(
    ("says", "safe", "unsafe"), [SHARED_FIRST_TOKEN, ONE_IS_SHORTER, DIFFERENT_BEGINNINGS]
)
def test_verdicts_of_several_tokens_count_whole(tmp_path, says, safe, unsafe):
    save_guard(tmp_path, says)
    scorer = guard(tmp_path, safe=safe, unsafe=unsafe, verdict_prefix="")
    lengths = {word: len(ids) for word, ids in scorer.verdict.words.items()}
    assert lengths == {word: len(word.split()) for word in (safe, unsafe)}
    expected = -np.diff(plain_logps(tmp_path, [safe, unsafe]))[:, 0]
    np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, atol=1e-4)


def test_a_model_that_writes_something_else_is_refused_with_what_it_wrote(tmp_path):
    save_guard(tmp_path, {"[verdict]": "hello", "hello": "</s>"})
    written = r"writes ' hello </s>' and ' hello </s>' .* no safe or unsafe: set safe and unsafe"
    with pytest.raises(UserError, match=written):
        guard(tmp_path)
    unlikely = (
        r"p\(safe or unsafe\) after '' is .* below min_mass 0.5; it writes ' hello "
        r"</s>'.*verdict_prefix"
    )
    with pytest.raises(UserError, match=unlikely):
        guard(tmp_path, verdict_prefix="")
    with pytest.raises(UserError, match="tokens of 'fine' are also those of 'foul'"):
        # Both are unknown to the tokenizer.
        guard(tmp_path, safe="fine", unsafe="foul", verdict_prefix="")


def test_without_a_chat_template_a_template_is_asked_for(tmp_path):
    save_guard(tmp_path, {"[verdict]": "safe unsafe"}, chat=False)
    with pytest.raises(UserError, match="no chat template; set template"):
        guard(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(CHAT)
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) .*set template"):
        guard(tmp_path)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"template": "{prompt} only"}, r"does not contain \{response\}"),
        ({"safe": []}, "at least one word"),
        ({"unsafe": ["unsafe", "safe"]}, "none twice"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, match):
    with pytest.raises(ValueError, match=match):
        GuardScorerSettings(type="guard", model="x", **keys)


def byte_pair_tokenizer(corpus: list[str], size: int):
    """`text → ids` of a byte-level BPE trained on the corpus, as GPT-2's, Llama 3's and Qwen's
    are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def test_words_are_tokenized_where_they_stand():
    corpus = ["Safety: Safe", "Safety: Unsafe", "\n\nsafe", "\n\nunsafe"] * 50
    tokenizer = byte_pair_tokenizer(corpus, 290)
    tokens = lambda text: tokenizer.encode(text).ids
    base, words = tokenize_words(tokens, "Safety: ", ["Safe", "Unsafe"])
    # The prefix's space belongs to the verdict's token, so it is no part of what is given.
    assert tokenizer.decode(base) == "Safety:"
    assert tokenizer.decode(words["Safe"]) == " Safe" and len(words["Safe"]) == 1
    base, words = tokenize_words(tokens, "x\n\n", ["safe", "unsafe"])
    assert tokenizer.decode(base + words["safe"]) == "x\n\nsafe"
    assert tokenizer.decode(base + words["unsafe"]) == "x\n\nunsafe"
    assert words["safe"][0] != words["unsafe"][0]


def test_the_shared_beginning_of_two_words_is_of_both():
    letters = byte_pair_tokenizer(["ab"], 258)
    tokens = lambda text: letters.encode(text).ids
    _, words = tokenize_words(tokens, "x ", ["unsafe", "unsound"])
    assert len(words["unsafe"]) == 6 and words["unsafe"][:3] == words["unsound"][:3]
    with pytest.raises(ValueError, match="'un' are also those of 'unsafe' or begin them"):
        tokenize_words(tokens, "x ", ["un", "unsafe"])


def test_window_cuts_the_prompts_beginning_alone(tmp_path):
    save_guard(tmp_path, {"[verdict]": "safe unsafe"})
    with pytest.raises(UserError, match="exceeds its window of 10"):
        guard(tmp_path, max_length=10).score(PROMPTS, RESPONSES)
    scorer = guard(tmp_path, max_length=12, truncate=True)
    assert np.isfinite(scorer.score(PROMPTS, RESPONSES)).all()
    lengths = [scorer.text_length(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scorer.truncated == sum(length > 12 for length in lengths) > 0
    kept = scorer.tokenizer.decode(scorer.encode(PROMPTS[2], RESPONSES[3]))
    assert kept == f"[user] nothing in particular [assistant] {RESPONSES[3]} [verdict]"
    alone = r"template and the response .* alone exceed its window of 12"
    with pytest.raises(UserError, match=alone):
        scorer.score(["no"], ["la " * 12])


def test_a_guard_reads_the_whole_chat_and_cuts_its_earliest_turns(tmp_path):
    save_guard(tmp_path, {"[verdict]": "safe unsafe"})
    users = [{"role": "user", "content": text} for text in ("sing", "open the door", "no")]
    answer = {"role": "assistant", "content": "yes"}
    chat = [users[0], answer, users[1], answer, users[2]]
    last = "[user] no [assistant] la [verdict]"
    middle = f"[user] open the door [assistant] yes {last}"
    for window, read in ((60, f"[user] sing [assistant] yes {middle}"), (13, middle), (10, last)):
        scorer = guard(tmp_path, max_length=window, truncate=True)
        (prompt,) = scorer.told([chat])
        assert scorer.tokenizer.decode(scorer.encode(prompt, "la")) == read
        assert scorer.truncated == (window < 60)
    template = guard(tmp_path, template=TEMPLATE)
    assert template.text_length(chat, "la") > template.text_length(chat[2:], "la")


def test_fingerprint_is_of_contents_and_of_what_moves_the_score(tmp_path):
    from safetensors.torch import load_file, save_file

    save_guard(tmp_path, {"[verdict]": "safe unsafe"})
    first = guard(tmp_path).fingerprint
    how = {"batch_size": 2, "device": "cpu", "min_mass": 0.6, "negate": True}
    assert guard(tmp_path, **how).fingerprint == first
    swapped = {"safe": "unsafe", "unsafe": "safe"}
    changed = (swapped, {"template": TEMPLATE}, {"quantization": "nf4"})
    others = [guard(tmp_path, **keys).fingerprint for keys in changed]
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len({first, guard(tmp_path).fingerprint, *others}) == 5
