"""What a file of prompts holds: its columns, how many prompts, how long they are."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.draft.models import ModelFacts
from data_prep.errors import UserError
from data_prep.prompts.rows import read_rows
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.split import read_prompts
from data_prep.prompts.templates import tokenize_prompts

OPTION = "--prompts"

LAYOUTS = ("prompt", "chosen", "messages")
"""Columns by which a row's prompt is found."""

USUAL = ("question", "instruction", "query", "request", "input", "text")
"""What others call the column."""

FEWEST = 4


@dataclass(frozen=True)
class PromptFacts:
    """Prompts without duplicates, and their lengths in tokens as the model reads them.

    column: where they stand, in words.
    """

    column: str
    count: int
    duplicates: int
    format: str
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        """The longest prompt, in tokens."""
        return int(self.lengths.max())

    @property
    def usual(self) -> int:
        """What 99 of 100 prompts do not exceed, in tokens."""
        return int(np.quantile(self.lengths, 0.99, method="higher"))


def read_prompt_file(source: str, model: ModelFacts) -> PromptFacts:
    """Read a file or folder of prompts. Raises UserError where no prompts are in it."""
    columns = _columns(source)
    chat = "chat" if model.chat else "text"
    try:
        prompts, duplicates = read_prompts(source, chat)
    except UserError as error:
        if "set prompts.format: chat" not in str(error):
            raise
        raise UserError(
            f"{OPTION}: {source} holds chats, and the tokenizer of {model.source} has no chat "
            "template; give texts, or a chat model"
        ) from error
    if len(prompts) < FEWEST:
        raise UserError(
            f"{OPTION}: {source} has {len(prompts)} prompts; {FEWEST} are the fewest that can be "
            "split, and some hundreds are usual"
        )
    table = pd.DataFrame({"prompt_id": prompts.index, "prompt": prompts.to_numpy()})
    settings = PromptSettings.model_validate({"source": source, "format": chat})
    tokens = tokenize_prompts(table, settings, model.tokenizer)
    return PromptFacts(
        column=next(name for name in ("prompt", "chosen", "messages") if name in columns),
        count=len(prompts),
        duplicates=duplicates,
        format=chat,
        lengths=np.array([len(ids) for ids in tokens.values()]),
    )


def _columns(source: str) -> list[str]:
    """The first row's columns. Raises UserError where none of them holds a prompt."""
    if not Path(source).expanduser().exists():
        raise UserError(f"{OPTION}: {source}: no such file or folder")
    first = next(iter(read_rows(source)), None)
    if first is None:
        raise UserError(f"{OPTION}: {source} is empty; write a prompt a row")
    if first.content is None:  # reading all rows names every such row
        return list(LAYOUTS)
    columns = list(first.content)
    if not set(columns) & set(LAYOUTS):
        likely = next((name for name in columns if name.lower() in USUAL), None)
        raise UserError(
            f"{OPTION}: {source}: no column is called prompt (it has {', '.join(columns)}); rename "
            f"{likely or 'the one with the prompts'} to prompt"
        )
    return columns
