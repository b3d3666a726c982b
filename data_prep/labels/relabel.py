"""`cdpo data relabel`: a file of scored responses to a file of pairs or groups.

The needed columns are read whole (parquet through arrow, other formats through `read_table`).
Pairs and groups come by prompt, ascending by prompt_id, and are written piece by piece, because
they are many times more than the responses.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.labels.groups import group_ids, group_rows, group_scores, no_group
from data_prep.labels.lagrangian import LabelScores
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.preferences import Labels, Pairs, no_pair, pair_pieces
from data_prep.labels.prompt_rows import PromptRows, require_responses
from data_prep.labels.row_groups import arrow_texts, encoded, row_groups, taken
from data_prep.readers.tables import read_columns, read_table
from data_prep.settings import derive_seed
from data_prep.tables import require_columns, require_unique

IDS, TEXTS = ("prompt_id", "response_id"), ("prompt", "response")


GROUPS_AT_ONCE = 1 << 15


def relabel_pairs(
    path: Path,
    output: Path,
    reward: str,
    lambda_: pd.Series | MultiplierRange,
    *,
    labels: Labels,
    pairs_per_prompt: int | None,
    seed: int,
    prompt_texts: "pd.Series | bool" = False,
) -> dict[str, object]:
    """Write `label_pairs` of a file (parquet, csv, tsv, json, jsonl).

    With a range each pair draws its λ and has it in columns more, the last. prompt_texts: add the
    columns prompt, chosen and rejected (texts). True takes the prompt from
    the file's column prompt (the first row of each prompt), a Series from itself, by prompt_id.

    Returns counts: pairs, prompts (with a pair), ambiguous_fraction (share of pairs with
    0.05 < prob < 0.95), single_response (prompts left out). Raises UserError on a bad table, or
    where no prompt has two responses.
    """
    responses = _read(path, reward, lambda_, prompt_texts)
    pairs = ambiguous = 0
    with replacing(output) as temporary, row_groups(temporary) as write:
        pieces = pair_pieces(
            responses.prompts,
            responses.scores,
            labels=labels,
            pairs_per_prompt=pairs_per_prompt,
            seed=seed,
        )
        for piece in pieces:
            write(_pair_table(responses, piece))
            pairs += len(piece.prob)
            ambiguous += int((np.abs(piece.prob - 0.5) < 0.45).sum())
        if not pairs:
            raise no_pair()
    counts = responses.prompts.counts
    return {
        "pairs": pairs,
        "prompts": int((counts > 1).sum()),
        "ambiguous_fraction": ambiguous / pairs,
        "single_response": int((counts == 1).sum()),
    }


def relabel_groups(
    path: Path,
    output: Path,
    reward: str,
    lambda_: pd.Series | MultiplierRange,
    *,
    group_size: int,
    groups_per_prompt: int,
    seed: int,
) -> dict[str, int]:
    """Write `label_groups` of a file; with a range each group draws its λ.

    Returns counts: groups, prompts (with groups), too_few_responses (prompts left out). Raises
    UserError on a bad table, or where no prompt has `group_size` responses.
    """
    responses = _read(path, reward, lambda_, False)
    rule = {"group_size": group_size, "groups_per_prompt": groups_per_prompt, "seed": seed}
    grouped = group_rows(responses.prompts, **rule)
    if not len(grouped):
        raise no_group(group_size)
    per_piece = max(1, GROUPS_AT_ONCE // groups_per_prompt)
    with replacing(output) as temporary, row_groups(temporary) as write:
        for begin in range(0, len(grouped), per_piece):
            piece = grouped[begin : begin + per_piece]
            write(_group_table(responses, piece, derive_seed(seed, 0, "lambda")))
    left_out = len(responses.prompts.counts) - len(grouped)
    return {
        "groups": len(grouped) * groups_per_prompt,
        "prompts": len(grouped),
        "too_few_responses": left_out,
    }


def read_prompt_texts(path: Path) -> pd.Series:
    """Read `prompt` by prompt_id from a table that has both, as a run's prompts.parquet.

    Raises UserError where a column is missing or an id comes twice.
    """
    table = read_table(path)
    require_columns(table, ["prompt_id", "prompt"], str(path))
    require_unique(table, ["prompt_id"], str(path))
    return table.set_index("prompt_id")["prompt"]


@dataclass(frozen=True)
class _Responses:
    """A file's responses. frame: the needed columns; hashes: of the response ids; texts: what
    stands beside the ids; scores: what the labels' scores are made of."""

    frame: pd.DataFrame
    hashes: np.ndarray
    texts: dict[str, pd.Series]
    scores: LabelScores

    @cached_property
    def prompts(self) -> PromptRows:
        return PromptRows.of(self.frame, self.hashes)

    @cached_property
    def columns(self) -> dict[str, pa.Array]:
        """Ids and texts in arrow, where taking rows makes no Python objects."""
        return {
            name: arrow_texts(column)
            for name, column in [*((n, self.frame[n]) for n in IDS), *self.texts.items()]
        }


def _read(
    path: Path, reward: str, lambda_: pd.Series | MultiplierRange, prompt_texts: "pd.Series | bool"
) -> _Responses:
    """The needed columns of a file; raises UserError with all rows that are wrong."""
    path, with_texts = Path(path), prompt_texts is not False
    utilities = lambda_.index if isinstance(lambda_, pd.Series) else lambda_.center.index
    columns = [
        *IDS,
        reward,
        *utilities,
        *(TEXTS if prompt_texts is True else TEXTS[1:] if with_texts else ()),
    ]
    frame = read_columns(path, columns)
    require_columns(frame, IDS, "responses")
    hashes = require_responses(frame)
    texts: dict[str, pd.Series] = {}
    if with_texts:
        _require_texts(frame, columns[-2:] if prompt_texts is True else columns[-1:])
        texts = {"prompt": _prompts_of(frame, prompt_texts), "response": frame["response"]}
    return _Responses(frame, hashes, texts, LabelScores.of(frame, reward, lambda_))


def _require_texts(frame: pd.DataFrame, columns: list[str]) -> None:
    require_columns(frame, columns, "responses (--text)")
    for name in columns:
        wrong = np.flatnonzero([not isinstance(value, str) for value in frame[name]])
        if len(wrong):
            raise UserError(
                f"responses (--text): column {name} is not a text in row {wrong[0]} ({len(wrong)} "
                "rows); mend or remove them"
            )


def _prompts_of(frame: pd.DataFrame, prompt_texts: "pd.Series | bool") -> pd.Series:
    """The text of every row's prompt."""
    if isinstance(prompt_texts, bool):
        return frame["prompt_id"].map(
            frame.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
        )
    missing = ~frame["prompt_id"].isin(prompt_texts.index)
    if missing.any():
        raise UserError(
            f"--prompts: has no prompt_id {frame['prompt_id'][missing].iloc[0]!r}, which the "
            "responses name; give their own table"
        )
    return frame["prompt_id"].map(prompt_texts)


def _pair_table(responses: _Responses, pairs: Pairs) -> pa.Table:
    """Rows of the pairs table, with texts where there are any."""
    columns = {
        name: encoded(column.take(pa.array(pairs.rows)), name)
        for name, column in responses.columns.items()
    }
    table = {
        "prompt_id": taken(columns["prompt_id"], pairs.chosen),
        "chosen_id": taken(columns["response_id"], pairs.chosen),
        "rejected_id": taken(columns["response_id"], pairs.rejected),
        "prob": pairs.prob,
        "target": pairs.target,
        "margin": pairs.margin,
    }
    if "prompt" in columns:
        table["prompt"] = taken(columns["prompt"], pairs.chosen)
        table["chosen"] = taken(columns["response"], pairs.chosen)
        table["rejected"] = taken(columns["response"], pairs.rejected)
    drawn = pairs.multipliers
    return pa.table(table | {str(name): drawn[name].to_numpy() for name in drawn})


def _group_table(responses: _Responses, grouped: np.ndarray, seed: int) -> pa.Table:
    """Rows of the groups table; grouped: (num_prompts, groups_per_prompt, group_size) row numbers;
    seed: of the multipliers, where groups draw them."""
    _, groups_per_prompt, group_size = grouped.shape
    rows = grouped.reshape(-1)
    prompt_ids = responses.columns["prompt_id"].take(pa.array(grouped[:, 0, 0])).dictionary_encode()
    names = group_ids(prompt_ids.to_pylist(), groups_per_prompt)
    groups = pa.array(names, pa.large_string()).dictionary_encode()
    score, multipliers = group_scores(responses.scores, grouped, names, seed)
    at = np.arange(len(rows)) // group_size
    ids = responses.columns["response_id"].take(pa.array(rows))
    return pa.table(
        {
            "prompt_id": taken(prompt_ids, at // groups_per_prompt),
            "group_id": taken(groups, at),
            "response_id": ids.dictionary_encode(),
            "score": score,
            **{name: drawn.to_numpy() for name, drawn in multipliers.items()},
        }
    )
