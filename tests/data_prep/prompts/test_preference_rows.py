"""A dataset's answers as tokens: behind their prompt, one EOS, and what is left out is counted."""

import json

import numpy as np
import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.prompts.layouts import answers_of, prompt_of
from data_prep.prompts.preference_rows import (
    answer_table,
    given_pairs,
    labelled,
    read_answers,
    turn_end,
)
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.split import read_prompts
from data_prep.prompts.templates import tokenize_prompts
from tests.helpers.models import save_word_tokenizer
from tests.helpers.paths import DATA
from tests.helpers.tables import rows_of

HH = "\n\nHuman: {prompt}\n\nAssistant:"


def settings_for(name: str, **more: object) -> PromptSettings:
    return PromptSettings(source=str(DATA / f"{name}.jsonl"), **more)


def read(settings: PromptSettings, label: str | None = None):
    prompts, _ = read_prompts(settings.source, settings.format)
    return prompts, read_answers(settings, prompts.index, label=label)


def tabulated(settings, tokenizer, label=None, max_length=512):
    prompts, answers = read(settings, label)
    table = pd.DataFrame({"prompt_id": prompts.index, "prompt": prompts.to_numpy()})
    tokens = tokenize_prompts(table, settings, tokenizer)
    return (
        answer_table(
            answers, prompts, tokens, settings, tokenizer, (tokenizer.eos_token_id,), max_length
        ),
        answers,
        tokens,
    )


def word_tokenizer(folder, *names: str):
    from transformers import AutoTokenizer

    texts = [
        text
        for name in names
        for row in rows_of(name)
        for text in (prompt_of(row, False), *answers_of(row, True))
        if text
    ]
    save_word_tokenizer(folder, " ".join(texts))
    return AutoTokenizer.from_pretrained(folder)


def test_golden_answers_and_labels_of_every_source(caplog):
    prompts, answers = read(settings_for("pku_saferlhf"), "safer_response_id")
    first, second, third = answers.texts
    assert (
        list(answers.texts.values())
        == [t for row in rows_of("pku_saferlhf") for t in answers_of(row, False)][:3]
    )
    assert set(answers.prompts.values()) == set(prompts.index) and all(
        rid.startswith("dataset/") for rid in answers.texts
    )
    # The second row's safer answer is blank: as published, so it is no error, but counted and
    # named.
    assert list(answers.pairs) == [(first, second)] and answers.left_out == {"blank": 1, "rows": 1}
    assert "1 blank" in caplog.text and "first in line 2" in caplog.text
    assert third not in dict(answers.pairs)
    _, answers = read(settings_for("pku_saferlhf_30k"), "better_response_id")
    better = [(answers.texts[a], answers.texts[b]) for a, b in answers.pairs]
    rows = rows_of("pku_saferlhf_30k")
    assert better == [
        (rows[0]["response_0"], rows[0]["response_1"]),
        (rows[1]["response_1"], rows[1]["response_0"]),
    ]
    _, answers = read(settings_for("hh_rlhf", format="chat"), "chosen")
    assert [answers.texts[a] for a, _ in answers.pairs] == [
        "Train and plain do.",
        "Then look under the seats first.",
    ]
    assert answers.left_out == {"irregular": 1, "rows": 1}


def test_only_wanted_prompts_and_no_answer_twice(tmp_path):
    row = {"prompt": "a", "response_0": "x", "response_1": "y", "better_response_id": 1}
    rows = [
        row,
        row,
        row | {"better_response_id": 0},
        row | {"response_1": "x"},
        row | {"prompt": "b"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = PromptSettings(source=str(tmp_path / "p.jsonl"))
    prompts, _ = read_prompts(settings.source, "text")
    answers = read_answers(settings, [prompts.index[prompts == "a"][0]], label="better_response_id")
    x, y = answers.texts
    assert list(answers.texts.values()) == ["x", "y"] and list(answers.pairs) == [
        (y, x),
        (x, y),
    ]  # annotators may disagree
    assert answers.left_out == {"repeated": 6, "repeated_rows": 1, "rows": 1}
    assert given_pairs(answers)["chosen_id"].tolist() == [y, x]
    table = labelled(given_pairs(answers), pd.Series({x: 1.0, y: 3.0}))
    assert table["margin"].tolist() == [2.0, -2.0] and table["target"].tolist() == [1.0, 1.0]
    assert np.allclose(table["prob"], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))])


def test_malformed_answers_and_sources_without_any(tmp_path):
    rows = [
        {"prompt": "a", "response_0": "x", "response_1": "y"},
        {"prompt": "b"},
        {"prompt": "c", "response_0": "x", "response_1": 1},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = PromptSettings(source=str(tmp_path / "p.jsonl"))
    with pytest.raises(
        UserError,
        match=r"line 2: no answers beside the prompt \(it has prompt\); line 3: `response_1` is 1",
    ):
        read_answers(settings, read_prompts(settings.source, "text")[0].index)


def test_tokens_stand_behind_the_prompt_and_end_with_one_eos(tmp_path):
    tokenizer = word_tokenizer(tmp_path, "pku_saferlhf_30k")
    settings = settings_for("pku_saferlhf_30k", template="USER: {prompt} ASSISTANT: ")
    table, answers, tokens = tabulated(settings, tokenizer, "safer_response_id")
    assert len(table) == 4 and (table["source"] == "dataset").all() and table["ended"].all()
    assert table[["sample_logp", "policy_logp", "ref_logp"]].isna().all(axis=None)
    prompts, _ = read_prompts(settings.source, "text")
    for row in table.itertuples():
        ids = row.token_ids.tolist()
        assert (
            ids.count(tokenizer.eos_token_id) == 1
            and ids[-1] == tokenizer.eos_token_id
            and tokenizer.bos_token_id not in ids
        )
        whole = (
            settings.template.replace("{prompt}", prompts[row.prompt_id])
            + answers.texts[row.response_id]
        )
        assert tokens[row.prompt_id] + ids[:-1] == tokenizer(whole)["input_ids"]


def test_what_does_not_fit_or_holds_special_tokens_is_counted_with_its_pair(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "model", "pku_saferlhf_30k")
    row = {
        "prompt": "lock",
        "response_0": "one",
        "response_1": "one lifts",
        "better_response_id": 0,
    }
    rows = [row, row | {"response_1": "one </s> lifts"}, row | {"response_1": "one " * 9}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = PromptSettings(source=str(tmp_path / "p.jsonl"), template="to {prompt} ")
    table, answers, _ = tabulated(settings, tokenizer, "better_response_id", max_length=6)
    assert table["response"].tolist() == ["one", "one lifts"] and len(answers.pairs) == 1
    assert answers.left_out == {"repeated": 2, "special": 1, "too_long": 1, "rows": 2}
    with pytest.raises(
        UserError, match=r"all 4 answers of the dataset are left out \(.*3 too_long"
    ):
        tabulated(settings, tokenizer, max_length=2)


def test_a_tokenizer_that_opens_texts_with_a_space_does_not_open_answers_with_one(tmp_path):
    """As sentencepiece models do: `Hello` by itself would be `▁Hello`, which no policy says behind
    `ASSISTANT:`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<unk>", "</s>", "▁", *"abcdef:"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex("."), "isolated"),
        ]
    )
    characters.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="</s>", unk_token="<unk>"
    )
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "ab", "response_0": "cd", "response_1": " cd"}) + "\n"
    )
    table, _, tokens = tabulated(
        PromptSettings(source=str(tmp_path / "p.jsonl"), template="{prompt}:"), tokenizer
    )
    assert tokenizer("cd")["input_ids"][0] == vocabulary["▁"] and list(tokens.values()) == [
        [2, 3, 4, 9]
    ]
    assert [ids.tolist() for ids in table["token_ids"]] == [[5, 6, 1], [2, 5, 6, 1]]


def test_the_turn_ends_as_the_chat_template_ends_it(tmp_path):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    save_word_tokenizer(tmp_path, "user assistant <|im_end|> Capital of Peru? Lima.")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = template
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = settings_for("ultrafeedback_binarized", format="chat")
    assert turn_end(chat, tokenizer, (tokenizer.eos_token_id, closing)) == closing
    assert turn_end(chat, tokenizer, (tokenizer.eos_token_id,)) == tokenizer.eos_token_id
    assert (
        turn_end(settings_for("hh_rlhf"), tokenizer, (tokenizer.eos_token_id, closing))
        == tokenizer.eos_token_id
    )


def test_hh_answers_as_text_stand_as_published(tmp_path):
    tokenizer = word_tokenizer(tmp_path, "hh_rlhf")
    table, answers, _ = tabulated(settings_for("hh_rlhf", template=HH), tokenizer)
    assert next(iter(answers.texts.values())) == " Train and plain do." and len(table) == 5
