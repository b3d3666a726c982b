"""Chats: messages as they are found in rows and tables, and what of them is told to whom.

A prompt is a text, or a list of messages with role and content. Written as text (JSON, or Python's
own form as in a csv) it is still the messages, never a user's words.
"""

import ast
import json
import re
from typing import Any

Messages = list[dict[str, str]]

Prompt = str | Messages

_WRITTEN = re.compile(r"\s*\[\s*\{.*['\"](role|content)['\"]\s*:.*\}\s*\]\s*", re.S)

_SHAPE = "a chat prompt is a list of {role, content} messages, a text prompt a string"


def read_prompt(value: object) -> Prompt:
    """Read a prompt as a row holds it; text parts of a message become one text.

    Raises ValueError for what is neither a text nor a list of messages.
    """
    if isinstance(value, str):
        messages = messages_in(value)
        return value if messages is None else messages
    items = _plain_list(value)
    if items is None:
        raise ValueError(_SHAPE)
    return [_message(item, number) for number, item in enumerate(items, 1)]


def messages_in(text: str) -> Messages | None:
    """The messages that a text is the written form of; None for any other text.

    Raises ValueError for such a list that cannot be read.
    """
    if not _WRITTEN.fullmatch(text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            items = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in items):
            return [_message(item, number) for number, item in enumerate(items, 1)]
        return None
    raise ValueError(
        "looks like a list of messages written as text, but is neither JSON nor Python; write it "
        "as JSON"
    )


def stored_prompt(prompt: str, format: str) -> Prompt:
    """A prompt of a prompts table: a text, or in a chat the messages of its JSON list."""
    if format != "chat":
        return prompt
    messages: Messages = json.loads(prompt)
    return messages


def last_user_text(prompt: Prompt, format: str = "text") -> str:
    """The text itself, or the last message of a chat, which is the user's."""
    prompt = stored_prompt(prompt, format) if isinstance(prompt, str) else prompt
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def told(prompt: Prompt, conversation: bool) -> Prompt:
    """Decide what a scorer is told: the whole chat where it reads a `conversation`, else its last
    user text. A chat of one user message is its text."""
    if isinstance(prompt, str) or (
        conversation and [message["role"] for message in prompt] != ["user"]
    ):
        return prompt
    return last_user_text(prompt)


def as_messages(prompt: Prompt) -> Messages:
    """A prompt as messages; a text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def conversation_text(prompt: Prompt) -> str:
    """A prompt as a template's `{prompt}`: a text as it is, a chat with a name before each turn."""
    prompt = told(prompt, conversation=True)
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)


def without_first_turn(prompt: Messages) -> Prompt:
    """A chat from its second user message on, with none of what stands before; the last one alone
    is its text."""
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if len(users) < 2:
        return prompt[-1]["content"]
    return told(prompt[users[1] :], conversation=True)


def _message(item: object, number: int) -> dict[str, str]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise ValueError(_SHAPE)
    content = item.get("content")
    if isinstance(content, str):
        return {"role": item["role"], "content": content}
    parts = _plain_list(content)
    if parts is None:
        raise ValueError(_SHAPE)
    return {"role": item["role"], "content": "\n".join(_part_text(p, number) for p in parts)}


def _part_text(part: object, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise ValueError(
            f"message {number} holds a part of type {kind}; only text parts can be read: leave "
            "the row out, or write what the part says as text"
        )
    return text


def _plain_list(value: Any) -> list[Any] | None:
    """A list, or the array in which pandas gives one of a parquet file."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value if isinstance(value, list) else None
