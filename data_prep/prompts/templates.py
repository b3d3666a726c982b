"""Prompts as the policy reads them: rendered by template, tokenized."""

import json
from itertools import islice
from typing import TYPE_CHECKING

import pandas as pd

from data_prep.errors import UserError
from data_prep.prompts.settings import PromptSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ENCODED_AT_ONCE = 1000


def last_user_text(prompt: str, format: str) -> str:
    """What scorers are told the prompt was: the text itself, or the last user message of a chat."""
    return json.loads(prompt)[-1]["content"] if format == "chat" else prompt


def lacking_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """What the tokenizer has in place of a usable chat template; None where it has one."""
    template = tokenizer.chat_template
    if not template:
        return "no chat template"
    if isinstance(template, dict) and "default" not in template:
        return f"several chat templates ({', '.join(template)}) and none of them is the default"
    return None


def rendered_prompts(
    prompts: list[str], settings: PromptSettings, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """The text that stands before a response, of each prompt. Raises UserError without a usable
    template."""
    if settings.format == "text":
        if "{prompt}" not in settings.template:
            raise UserError("prompts.template: does not contain {prompt}")
        return [settings.template.replace("{prompt}", prompt) for prompt in prompts]
    if problem := lacking_template(tokenizer):
        raise UserError(
            f"prompts.format: chat, but the tokenizer has {problem}; set format: text with an "
            "explicit template"
        )
    from jinja2 import TemplateError

    try:
        return [
            tokenizer.apply_chat_template(json.loads(p), add_generation_prompt=True, tokenize=False)
            for p in prompts
        ]
    except TemplateError as error:
        raise UserError(
            f"prompts: the tokenizer's chat template refuses a prompt ({error}); change the "
            "prompts or the template"
        ) from error


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
