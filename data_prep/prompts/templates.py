"""Prompts as the policy reads them: rendered by template, tokenized."""

import json
import re
from datetime import datetime
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

import pandas as pd

from data_prep.errors import UserError
from data_prep.prompts.messages import Messages, messages_in
from data_prep.prompts.settings import PromptSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ENCODED_AT_ONCE = 1000

TEMPLATE_CLOCK = datetime(2026, 1, 1)
"""What a chat template reads as the time. With the real one, the same recipe would give other
prompts and scores on another day, and a run that goes on tomorrow two kinds of them."""


def reads_clock(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for the time, as transformers offers it."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def write_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, add_generation_prompt: bool
) -> str:
    """Write a chat by the tokenizer's template; the time is TEMPLATE_CLOCK.

    Raises what the template raises (jinja2's TemplateError, TypeError).
    """
    changed = {}
    if reads_clock(tokenizer):
        changed = {"chat_template": _with_stopped_clock(tokenizer.get_chat_template())}
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **changed
        )
    )


@cache
def _with_stopped_clock(template: str) -> str:
    """The template behind a macro that takes the place of transformers' function of the same name:
    what is handed to a template becomes plain data, so no function can be. It knows the directives
    that the template writes."""
    directives = sorted(set(re.findall("%-?[A-Za-z]", template)))
    steps = [
        f"|replace({json.dumps(d)}, {json.dumps(TEMPLATE_CLOCK.strftime(d))})" for d in directives
    ]
    body = f"{{{{ format{''.join(steps)} }}}}"
    # the newline belongs to the block (trim_blocks), so the template still begins a line
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro %}}\n{template}"


def lacking_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """What the tokenizer has in place of a usable chat template; None where it has one."""
    template = tokenizer.chat_template
    if not template:
        return "no chat template"
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(sorted(template))
        return f"several chat templates ({names}) and none of them is the default"
    return None


def rendered_prompts(
    prompts: list[str], settings: PromptSettings, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """The text that stands before a response, of each prompt. Raises UserError without a usable
    template."""
    if settings.format == "text":
        if "{prompt}" not in settings.template:
            raise UserError("prompts.template: does not contain {prompt}")
        _refuse_chats(prompts)
        return [settings.template.replace("{prompt}", prompt) for prompt in prompts]
    if problem := lacking_template(tokenizer):
        raise UserError(
            f"prompts.format: chat, but the tokenizer has {problem}; set format: text with an "
            "explicit template"
        )
    from jinja2 import TemplateError

    chats = [_stored_messages(prompt) for prompt in prompts]
    try:
        return [write_chat(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    except TemplateError as error:
        raise UserError(
            f"prompts: the tokenizer's chat template refuses a prompt ({error}); change the "
            "prompts or the template"
        ) from error


def _refuse_chats(prompts: list[str]) -> None:
    """Raises UserError for messages in a table of texts: their JSON is not what a user said."""
    for prompt in prompts:
        try:
            chat = messages_in(prompt) is not None
        except ValueError:
            chat = False
        if chat:
            raise UserError(
                f"prompts: {prompt[:40]!r} is a list of messages, and the format is text; set "
                "prompts.format (--format) to chat"
            )


def _stored_messages(prompt: str) -> Messages:
    """The messages of a stored prompt; raises UserError for one that is a text."""
    messages = None
    try:
        messages = messages_in(prompt)
    except ValueError as error:
        raise UserError(f"prompts: {prompt[:40]!r} {error}") from error
    if messages is None:
        raise UserError(
            f"prompts: {prompt[:40]!r} is a text, and the format is chat; set prompts.format "
            "(--format) to text, or write the table with `data prompts --format chat`"
        )
    return messages


def encode(
    texts: list[str], settings: PromptSettings, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Token ids of rendered texts. The tokenizer's own BOS is put in front of a text without one; a
    chat template brings its own."""
    bos = tokenizer.bos_token
    bare = [settings.format == "chat" or (bool(bos) and text.startswith(bos)) for text in texts]
    ids: list[list[int]] = [[]] * len(texts)
    for without in {*bare}:
        rows = [i for i, b in enumerate(bare) if b == without]
        encoded = tokenizer(
            [texts[i] for i in rows], add_special_tokens=not without, return_attention_mask=False
        )["input_ids"]
        for i, row in zip(rows, encoded, strict=True):
            ids[i] = row
    return ids


def tokenize_prompts(
    prompts: pd.DataFrame, settings: PromptSettings, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, list[int]]:
    """Token ids of every prompt as the policy reads it, by prompt_id; at most one BOS in front and
    no EOS behind.

    Raises UserError without a usable template, for two BOS tokens, and for a chat template that
    closes the prompt with EOS.
    """
    tokens: dict[str, list[int]] = {}
    rows = zip(prompts["prompt_id"], prompts["prompt"], strict=True)
    while batch := list(islice(rows, ENCODED_AT_ONCE)):
        texts = rendered_prompts([prompt for _, prompt in batch], settings, tokenizer)
        for (pid, _), text, ids in zip(
            batch, texts, encode(texts, settings, tokenizer), strict=True
        ):
            tokens[pid] = _checked(pid, text, ids, settings, tokenizer)
    return tokens


def _checked(
    pid: str,
    text: str,
    ids: list[int],
    settings: PromptSettings,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[int]:
    """The ids without the EOS with which some tokenizers close every text: a prompt that has ended
    invites no response."""
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        if settings.format == "chat":
            raise UserError(
                f"prompts: {pid} ends with EOS ({tokenizer.eos_token}) under the tokenizer's chat "
                "template, which does not open the "
                "assistant's turn; mend the template, or set format: text with an explicit one"
            )
        if not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]
    if not ids:
        raise UserError(f"prompts: {pid} has no tokens under this template")
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(
            f"prompts: {pid} starts with two BOS tokens; remove the BOS from the template"
        )
    return ids
