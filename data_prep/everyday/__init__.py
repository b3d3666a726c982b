"""Everyday questions to a chat model, written for this project: 200 to fit on, 60 others for the
test, each behind a system message that asks for one short sentence; and two scorers for them."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.readers.rows import Row, text_rows

SPLITS = ("train", "test")


def question_rows(split: str) -> Iterator[Row]:
    """Read the questions of a split, as chat messages. Raises UserError for another split."""
    if split not in SPLITS:
        raise UserError(f"prompts: everyday has no split {split}; it has {', '.join(SPLITS)}")
    return text_rows(Path(__file__).with_name(f"{split}.jsonl"))
