"""Row layouts: which part of a dataset's row is the prompt, which are answers to it, and which
answer was preferred. Pure.

- PKU-SafeRLHF (30K, 10K, full, single-dimension): `prompt`, `response_0`, `response_1`; labels
  `better_response_id`, `safer_response_id` (0 or 1)
- HH-RLHF: `chosen`, `rejected`, whole dialogues of `\\n\\nHuman: ...\\n\\nAssistant: ...` turns
- UltraFeedback (binarized): `chosen`, `rejected`, lists of messages that begin with the prompt's;
  beside them `prompt` as text, `messages`
- answers alone: `prompt`; `chosen`, `rejected`, each a text, or a list with the assistant's message
- conversations: `messages`; the last one, where it is the assistant's, is the answer
- prompts: `prompt`, a text or a list of messages

A row that is none of these, or whose values have other types, is malformed: ValueError says how.
"""

import json
import re
from collections.abc import Collection, Iterable

from data_prep.prompts.messages import Messages, read_prompt

_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


_COLUMNS = frozenset({"prompt", "chosen", "rejected", "messages", "response_0", "response_1"})


_CHATS = ("prompt", "chosen", "rejected", "messages")
"""Columns that may hold messages."""


def layout_columns(columns: Iterable[str], more: Collection[str] = ()) -> list[str]:
    """The columns that a layout reads and those of `more`, in the table's order; all of them where
    none is known, so that a message can name them."""
    columns = list(columns)
    chosen = [c for c in columns if c in _COLUMNS or c.endswith("_response_id")]
    return [c for c in columns if c in chosen or c in more] if chosen else columns


def parse_hh(text: str) -> Messages:
    """Chat messages of an HH-RLHF dialogue string; raises ValueError when it is not one."""
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        raise ValueError("not a dialogue of '\\n\\nHuman: ...\\n\\nAssistant: ...' turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": text.strip()}
        for who, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def prompt_of(row: dict, chat: bool) -> str:
    """The prompt of one row as stored in the prompts table: plain text, or a JSON list of chat
    messages. Raises ValueError."""
    messages, text = _prompt(_with_chats(row))
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; a prompt ends with the user")
    if chat:
        return json.dumps(messages, ensure_ascii=False)
    if text is None:
        raise ValueError("the prompt is a list of messages; set prompts.format: chat")
    return text


def _prompt(row: dict) -> tuple[Messages, str | None]:
    """The messages before the answer, and the prompt as plain text where it has such a form."""
    if _is_hh(row):
        messages, _ = _before_answer(parse_hh(row["chosen"]))
        # Without its opening "Human:", which the template puts back; further turns keep their
        # marks, or the roles would be lost.
        turns = [
            f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
            for m in messages
        ]
        return messages, "".join(turns).removeprefix("\n\nHuman: ")
    if isinstance(dialogue := row.get("chosen", row.get("messages")), list):
        messages, _ = _before_answer(dialogue)
        if messages:
            alone = len(messages) == 1 and messages[0]["role"] == "user"
            return messages, messages[0]["content"] if alone else None
    if "prompt" not in row:
        raise ValueError(f"no `prompt` (it has {', '.join(map(str, row))})")
    prompt = row["prompt"]
    return (
        (prompt, None)
        if isinstance(prompt, list)
        else ([{"role": "user", "content": prompt}], prompt)
    )


def answers_of(row: dict, chat: bool) -> list[str | None]:
    """The row's answers to `prompt_of` it, as published: response_0 and response_1, chosen and
    rejected, or the one of `messages`.

    [] for a row with a prompt alone. None stands for what does not answer this prompt in one turn
    (a few rows of HH-RLHF end with two assistant turns, or differ in an earlier one). Raises
    ValueError.
    """
    row = _with_chats(row)
    if "response_0" in row and "response_1" in row:
        return [_text(row, column) for column in ("response_0", "response_1")]
    if _is_hh(row):
        prompt, _ = _before_answer(parse_hh(row["chosen"]))
        turns = (parse_hh(_text(row, side)) for side in ("chosen", "rejected"))
        answers = [_answer_to(prompt, messages) for messages in turns]
        return (
            answers if chat else [text and f" {text}" for text in answers]
        )  # as in the dialogue: a space after "Assistant:"
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], str):
            return [row["chosen"], _text(row, "rejected")]
        prompt, _ = _before_answer(row["chosen"])
        return [_answer_to(prompt, row[side]) for side in ("chosen", "rejected")]
    if (
        isinstance(row.get("messages"), list)
        and row["messages"][-1:]
        and row["messages"][-1].get("role") == "assistant"
    ):
        return [_answer_to(_before_answer(row["messages"])[0], row["messages"])]
    return []


def preferred(row: dict, column: str) -> int:
    """Which of the row's two answers (0 or 1) the label says is better. `column`:
    `better_response_id`, `safer_response_id` or another of 0 and 1 beside response_0 and
    response_1; `chosen` for rows of chosen and rejected. Raises ValueError."""
    needed = ("chosen", "rejected") if column == "chosen" else ("response_0", "response_1", column)
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"no `{missing[0]}` (it has {', '.join(map(str, row))})")
    if column == "chosen":
        return 0
    value = int(row[column]) if row[column] in ("0", "1") else row[column]
    if isinstance(value, bool) or value not in (0, 1):
        raise ValueError(f"`{column}` is {row[column]!r}; it must be 0 or 1")
    return int(value)


def _with_chats(row: dict) -> dict:
    """The row with its chats as messages, also those that are written as text."""
    chats = {
        name: read_prompt(row[name])
        for name in _CHATS
        if (name == "prompt" and name in row) or isinstance(row.get(name), str | list)
    }
    return row | chats


def _is_hh(row: dict) -> bool:
    return "prompt" not in row and isinstance(row.get("chosen"), str)


def _before_answer(messages: Messages) -> tuple[Messages, Messages]:
    """The messages up to the user's last one, and the assistant's behind it."""
    last = len(messages)
    while last and messages[last - 1]["role"] == "assistant":
        last -= 1
    return messages[:last], messages[last:]


def _answer_to(prompt: Messages, messages: Messages) -> str | None:
    """What the one assistant turn behind `prompt` says, or None."""
    before, answer = _before_answer(messages)
    same = [(m["role"], m["content"]) for m in before] == [
        (m["role"], m["content"]) for m in prompt
    ]
    return answer[0]["content"] if same and len(answer) == 1 else None


def _text(row: dict, column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"`{column}` is {row[column]!r}; it must be a text")
    return row[column]
