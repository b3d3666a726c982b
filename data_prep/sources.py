"""Prompts from files and hub datasets; the split; prompts as tokens.

One reader per row layout: rows with `prompt` (text or chat messages), HH-RLHF rows (`chosen`, `rejected`, each one string of
Human/Assistant turns), and the embedded world's. A prompt's id is a hash of its content, and so is its place in the split.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import AliasChoices, Field

from data_prep.settings import Settings, UserError
from data_prep.tables import read_json_rows, read_table, validate_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class DatasetSource(Settings):
    """A hub dataset, or the embedded world's prompts (`dataset: quickstart`)."""

    dataset: str = Field(description="hub id, or `quickstart`")
    split: str = Field("train", description="the dataset's split")
    revision: str | None = Field(None, description="branch, tag or commit of the dataset")


class PromptSettings(Settings):
    """Where prompts come from and how they are put to the policy."""

    model_config = Settings.model_config | {"populate_by_name": True}

    source: str | DatasetSource = Field(
        validation_alias=AliasChoices("source", "train"), description="file (jsonl, json, csv, tsv, parquet; .gz) or {dataset: ...}"
    )
    format: Literal["text", "chat"] = Field("text", description="text: put into `template`; chat: the tokenizer's chat template")
    template: str = Field("{prompt}", description="for format text: what the policy reads; must contain {prompt}")
    max_fit: int | None = Field(None, ge=1, description="keep at most so many fit prompts (lowest hash first)")
    max_test: int | None = Field(None, ge=2, description="keep at most so many test prompts (lowest hash first)")
    test: str | DatasetSource | float = Field(
        0.2, validation_alias=AliasChoices("test", "eval"), description="file or dataset of test prompts, or the fraction held out"
    )
    too_long: Literal["error", "drop"] = Field("error", description="prompts that do not fit: an error, or dropped and counted")


def read_rows(source: str | DatasetSource) -> tuple[list[dict], str]:
    """(rows, name for messages) of a file or dataset."""
    if isinstance(source, DatasetSource):
        if source.dataset == "quickstart":
            from data_prep.quickstart import PROMPTS

            return [{"prompt": p} for p in PROMPTS[source.split]], "quickstart"
        import datasets

        try:
            loaded = datasets.load_dataset(source.dataset, split=source.split, revision=source.revision)
        except (OSError, ValueError) as error:
            raise UserError(f"prompts: dataset {source.dataset} cannot be loaded ({str(error).splitlines()[0]})") from error
        return loaded.to_list(), source.dataset
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"prompts: {path}: no such file")
    if {".json", ".jsonl"} & set(path.suffixes):
        return read_json_rows(path), str(path)
    return read_table(path).to_dict("records"), str(path)


def parse_hh(text: str) -> list[dict[str, str]]:
    """Chat messages of an HH-RLHF dialogue string; raises ValueError when it is not one."""
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        raise ValueError("not a dialogue of '\\n\\nHuman: ...\\n\\nAssistant: ...' turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _prompt_of(row: dict, chat: bool) -> str:
    """The prompt of one row as stored in the table: plain text, or a JSON list of chat messages. Raises ValueError."""
    if "prompt" in row:
        prompt = row["prompt"]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    elif "chosen" in row and isinstance(row["chosen"], str):
        messages = parse_hh(row["chosen"])
        while messages[-1]["role"] == "assistant":  # a few published rows end with two assistant turns
            messages = messages[:-1]
        # Without its opening "Human:", which the template puts back; further turns keep their marks, or the roles would be lost.
        turns = [f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages]
        prompt = messages if chat else "".join(turns).removeprefix("\n\nHuman: ")
    else:
        raise ValueError(f"no `prompt` (it has {', '.join(row)})")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError("a chat prompt is a list of {role, content} messages, a text prompt a string")
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; a prompt ends with the user")
    if chat:
        return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)
    if isinstance(prompt, list):
        raise ValueError("the prompt is a list of messages; set prompts.format: chat")
    return prompt


def read_prompts(source: str | DatasetSource, format: str) -> tuple[pd.Series, int]:
    """Unique prompts by prompt_id (a hash of the content), and how many duplicates were left out.

    Raises UserError listing the rows that cannot be read.
    """
    rows, name = read_rows(source)
    prompts, broken = [], []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(_prompt_of(row, format == "chat"))
        except ValueError as error:
            broken.append(f"row {number}: {error}")
    if broken:
        more = f" (and {len(broken) - 3} more rows)" if len(broken) > 3 else ""
        raise UserError(f"{name}: {'; '.join(broken[:3])}{more}")
    if not prompts:
        raise UserError(f"{name}: no prompts in it")
    series = pd.Series({_prompt_id(p): p for p in prompts})
    return series, len(prompts) - len(series)


def _prompt_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def split_prompts(settings: PromptSettings, num_dual: int) -> tuple[pd.DataFrame, dict[str, int]]:
    """The prompts table with its split, and counts of what was left out (duplicates, in_test, over_max).

    Everything is decided by the prompts' hashes: test is the given source, or the fraction with the lowest hashes; dual is `num_dual` of
    the fit prompts. A fit prompt that is also a test prompt goes to test.
    """
    fit, duplicates = read_prompts(settings.source, settings.format)
    left_out = {"duplicates": duplicates, "in_test": 0, "over_max": 0}
    if isinstance(settings.test, float):
        if not 0 < settings.test < 1:
            raise UserError(f"prompts.test: {settings.test} is neither a source nor a fraction between 0 and 1")
        is_test = fit.index.map(lambda pid: int(pid[:8], 16) / 2**32 < settings.test)
        test, fit = fit[is_test], fit[~is_test]
    else:
        test, test_duplicates = read_prompts(settings.test, settings.format)
        left_out["duplicates"] += test_duplicates
        left_out["in_test"] = int(fit.index.isin(test.index).sum())
        fit = fit[~fit.index.isin(test.index)]
    total = len(fit) + len(test)
    fit, test = fit.sort_index()[: settings.max_fit], test.sort_index()[: settings.max_test]
    left_out["over_max"] = total - len(fit) - len(test)
    if len(fit) < 2 or len(test) < 2:
        raise UserError(f"prompts: {len(fit)} fit and {len(test)} test prompts; both need at least 2 (change prompts.test or the source)")
    # Another hash than the one that orders the fit prompts, so that dual is not the head of the list.
    ranked = sorted(fit.index, key=lambda pid: hashlib.sha256(f"dual/{pid}".encode()).digest())
    dual = set(ranked[:num_dual])
    split = ["dual" if pid in dual else "fit" for pid in fit.index] + ["test"] * len(test)
    table = pd.DataFrame({"prompt_id": [*fit.index, *test.index], "prompt": [*fit, *test], "split": split})
    return validate_prompts(table, "prompts"), left_out


def last_user_text(prompt: str, format: str) -> str:
    """What scorers are told the prompt was: the text itself, or the last user message of a chat."""
    return json.loads(prompt)[-1]["content"] if format == "chat" else prompt


def tokenize_prompts(prompts: pd.DataFrame, settings: PromptSettings, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Token ids of every prompt as the policy reads it, by prompt_id; at most one BOS. Raises UserError without a usable template."""
    tokens = {}
    if settings.format == "chat" and not tokenizer.chat_template:
        raise UserError("prompts.format: chat, but the tokenizer has no chat template; set format: text with an explicit template")
    if settings.format == "text" and "{prompt}" not in settings.template:
        raise UserError("prompts.template: does not contain {prompt}")
    for pid, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True):
        if settings.format == "chat":
            ids = tokenizer.apply_chat_template(json.loads(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        else:
            text = settings.template.replace("{prompt}", prompt)
            has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
            ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
            # Some tokenizers close every text with EOS; a prompt that has ended invites no response.
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
                ids = ids[:-1]
        if not ids:
            raise UserError(f"prompts: {pid} has no tokens under this template")
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise UserError(f"prompts: {pid} starts with two BOS tokens; remove the BOS from the template")
        tokens[pid] = list(ids)
    return tokens
