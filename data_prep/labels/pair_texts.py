"""The texts of pairs as other trainers read them: prompt, chosen and rejected.

Those of a chat are lists of messages, TRL's conversational format: written as text they would be
trained on to the letter. Ids of tokens are not handed over, so the other trainer puts an end token
behind every answer, also behind one that was cut off.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data_prep.errors import UserError
from data_prep.labels.row_groups import taken
from data_prep.prompts.messages import read_prompt
from data_prep.readers.tables import read_table
from data_prep.tables import require_columns, require_unique


@dataclass(frozen=True)
class PairTexts:
    """What the texts of pairs are made of. prompts: by prompt_id, texts or messages; None takes the
    responses' own column `prompt` (the first row of each prompt). drop_cut_off: leave out responses
    that did not end (column `ended`)."""

    prompts: pd.Series | None = None
    drop_cut_off: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the responses that are read where they have them."""
        return (
            ("response", "ended") if self.prompts is not None else ("prompt", "response", "ended")
        )

    def ended(self, responses: pd.DataFrame) -> np.ndarray | None:
        """Which responses ended, (num_responses,); None where the table does not say.

        Raises UserError where the column holds another value than true and false, or is missing
        and needed.
        """
        if "ended" not in responses:
            if self.drop_cut_off:
                raise UserError(
                    "responses: no column ended says which were cut off; leave out --drop-cut-off"
                )
            return None
        if responses["ended"].dtype == bool:
            return responses["ended"].to_numpy()
        values = responses["ended"].to_numpy(object)
        wrong = [i for i, value in enumerate(values) if not isinstance(value, bool | np.bool_)]
        if wrong:
            raise UserError(
                f"responses (--text): column ended is not true or false in row {wrong[0]} "
                f"({len(wrong)} rows); mend or remove them"
            )
        return values.astype(bool)

    def of(self, responses: pd.DataFrame) -> tuple[dict[str, pd.Series], bool]:
        """Give every response's prompt and response, (num_responses,) each, and whether prompts are
        chats: then each is the JSON of its messages.

        Raises UserError for what is neither text nor messages, and where some prompts are chats and
        others are not.
        """
        _require_texts(responses, "response", str)
        if self.prompts is None:
            _require_texts(responses, "prompt", (str, list, np.ndarray))
            table = responses.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
        else:
            table, missing = self.prompts, ~responses["prompt_id"].isin(self.prompts.index)
            if missing.any():
                raise UserError(
                    f"--prompts: has no prompt_id {responses['prompt_id'][missing].iloc[0]!r}, "
                    "which the responses name; give their own table"
                )
            table = table[table.index.isin(responses["prompt_id"])]
        texts, chat = _as_texts(table)
        prompts = responses["prompt_id"].map(texts)
        return {"prompt": prompts, "response": responses["response"]}, chat


def read_prompt_texts(path: Path) -> pd.Series:
    """Read `prompt` by prompt_id from a table that has both, as a run's prompts.parquet.

    Raises UserError where a column is missing or an id comes twice.
    """
    table = read_table(path)
    require_columns(table, ["prompt_id", "prompt"], str(path))
    require_unique(table, ["prompt_id"], str(path))
    return table.set_index("prompt_id")["prompt"]


def pair_columns(
    prompts: pa.DictionaryArray,
    responses: pa.DictionaryArray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    chat: bool,
) -> dict[str, pa.Array]:
    """The columns prompt, chosen and rejected of pairs, (num_pairs,) each: texts, or in a chat
    lists of messages, the answers' the assistant's. chosen, rejected: places in the columns."""
    sides = {"chosen": taken(responses, chosen), "rejected": taken(responses, rejected)}
    if not chat:
        return {"prompt": taken(prompts, chosen), **sides}
    asked = taken(prompts, chosen)
    messages = _message_lists(json.loads(text) for text in asked.dictionary.to_pylist())
    return {"prompt": messages.take(asked.indices)} | {
        name: _lists(np.arange(len(texts) + 1), _same("assistant", len(texts)), texts)
        for name, texts in sides.items()
    }


def _require_texts(frame: pd.DataFrame, name: str, kinds: type | tuple[type, ...]) -> None:
    require_columns(frame, [name], "responses (--text)")
    wrong = np.flatnonzero([not isinstance(value, kinds) for value in frame[name]])
    if len(wrong):
        raise UserError(
            f"responses (--text): column {name} is not a text in row {wrong[0]} ({len(wrong)} "
            "rows); mend or remove them"
        )


def _as_texts(prompts: pd.Series) -> tuple[pd.Series, bool]:
    """Prompts by prompt_id as texts, and whether they are chats; a chat's is the JSON of its
    messages."""
    texts, chats = [], []
    for prompt_id, value in prompts.items():
        try:
            prompt = read_prompt(value)
        except ValueError as error:
            raise UserError(f"prompts (--text): {prompt_id}: {error}") from error
        chats.append(not isinstance(prompt, str))
        texts.append(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))
    if any(chats) and not all(chats):
        chat, text = (prompts.index[chats.index(kind)] for kind in (True, False))
        raise UserError(
            f"prompts (--text): {chat} is a list of messages, and {text} a text; relabel chats and "
            "texts apart"
        )
    return pd.Series(texts, index=prompts.index, dtype=object), any(chats)


def _message_lists(chats: Iterable[list[dict[str, str]]]) -> pa.ListArray:
    """Chats as lists of messages, (num_chats,)."""
    lengths, roles, contents = [0], [], []
    for chat in chats:
        lengths.append(len(chat))
        roles += [message["role"] for message in chat]
        contents += [message["content"] for message in chat]
    columns = (
        pa.array(texts, pa.large_string()).dictionary_encode() for texts in (roles, contents)
    )
    return _lists(np.cumsum(lengths), *columns)


def _lists(offsets: np.ndarray, roles: pa.Array, contents: pa.Array) -> pa.ListArray:
    messages = pa.StructArray.from_arrays([roles, contents], names=["role", "content"])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)


def _same(text: str, count: int) -> pa.DictionaryArray:
    """One text many times, shape (count,)."""
    return pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(count, np.int32)), pa.array([text], pa.large_string())
    )
