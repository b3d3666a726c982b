"""Chats in every form that rows hold them in, and what of them is told to whom."""

import json

import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.prompts.layouts import answers_of, prompt_of
from data_prep.prompts.messages import (
    conversation_text,
    last_user_text,
    read_prompt,
    told,
    without_first_turn,
)
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.templates import rendered_prompts
from data_prep.readers.tables import read_table

CHAT = [
    {"role": "system", "content": "Answer in French."},
    {"role": "user", "content": "It's a city?"},
    {"role": "assistant", "content": 'Yes, "Paris".'},
    {"role": "user", "content": "And\nthen?"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
]
FORMS = {
    "a list": CHAT,
    "JSON": json.dumps(CHAT),
    "indented JSON": json.dumps(CHAT, indent=2) + "\n",
    "Python's form": str(CHAT),
    "more keys": [message | {"name": None} for message in CHAT],
}


@pytest.mark.parametrize("form", FORMS)
def test_messages_are_messages_in_every_form(form):
    assert read_prompt(FORMS[form]) == CHAT
    assert json.loads(prompt_of({"prompt": FORMS[form]}, chat=True)) == CHAT
    dialogue = FORMS[form] if isinstance(FORMS[form], str) else [*FORMS[form]]
    assert json.loads(prompt_of({"messages": dialogue}, chat=True)) == CHAT
    with pytest.raises(ValueError, match=r"set prompts\.format: chat"):
        prompt_of({"prompt": FORMS[form]}, chat=False)


def test_answers_written_as_messages_are_answers():
    sides = [[*CHAT, {"role": "assistant", "content": text}] for text in ("Lyon", "Rome")]
    row = {"chosen": str(sides[0]), "rejected": json.dumps(sides[1])}
    assert answers_of(row, chat=True) == ["Lyon", "Rome"]


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[{a: 1}] is this YAML?", '[{"role": "x"}]', "[]", "[{'role': 'a'"]
)
def test_other_texts_in_brackets_are_texts(text):
    assert read_prompt(text) == text


def test_text_parts_become_one_text(tmp_path):
    assert read_prompt(PARTS) == [{"role": "user", "content": "one\ntwo"}]
    assert read_prompt(json.dumps(PARTS)) == read_prompt(PARTS)
    pd.DataFrame({"prompt": [PARTS, CHAT[1:2]]}).iloc[:1].to_parquet(tmp_path / "t.parquet")
    kept = read_table(tmp_path / "t.parquet")["prompt"][0]  # an array of numpy's
    assert read_prompt(kept) == read_prompt(PARTS)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "1 holds a part of type image_url",
        ),
        ([CHAT[1], {"role": "user", "content": [3]}], "message 2 holds a part of type int"),
        ([{"role": "assistant", "content": None}], "list of {role, content}"),
        ([{"content": "a"}], "list of {role, content}"),
        (None, "list of {role, content}"),
        (5, "list of {role, content}"),
        ("[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]", "neither JSON"),
    ],
)
def test_what_is_no_chat_says_so(value, match):
    with pytest.raises(ValueError, match=match):
        read_prompt(value)


def test_what_is_told_of_a_chat():
    assert told(CHAT, conversation=True) == CHAT
    assert told(CHAT, conversation=False) == last_user_text(CHAT) == "And\nthen?"
    assert told(CHAT[1:2], conversation=True) == "It's a city?" == told("It's a city?", True)
    assert told(CHAT[:2], conversation=True) == CHAT[:2]  # a system message is told
    assert conversation_text(CHAT) == (
        'System: Answer in French.\n\nUser: It\'s a city?\n\nAssistant: Yes, "Paris".\n\n'
        "User: And\nthen?"
    )
    assert conversation_text(CHAT[1:2]) == "It's a city?"
    assert without_first_turn(CHAT) == "And\nthen?" == without_first_turn(CHAT[:1] + CHAT[3:])
    assert without_first_turn([*CHAT, *CHAT[2:]]) == [CHAT[3], *CHAT[2:]]


def test_a_table_in_the_other_format_is_refused():
    text, chat = PromptSettings(source="x"), PromptSettings(source="x", format="chat")
    with pytest.raises(UserError, match="is a list of messages, and the format is text"):
        rendered_prompts([json.dumps(CHAT)], text, None)

    class Tokenizer:
        chat_template = "x"

    with pytest.raises(UserError, match="is a text, and the format is chat"):
        rendered_prompts(["hello"], chat, Tokenizer())
