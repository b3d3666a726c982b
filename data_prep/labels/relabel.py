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
from data_prep.labels.pair_texts import PairTexts, pair_columns
from data_prep.labels.preferences import Labels, Pairs, no_pair, pair_pieces
from data_prep.labels.prompt_rows import PromptRows, require_responses
from data_prep.labels.row_groups import arrow_texts, encoded, pieces, taken
from data_prep.readers.tables import read_columns
from data_prep.settings import derive_seed
from data_prep.tables import require_columns, require_scores

IDS = ("prompt_id", "response_id")


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
    texts: PairTexts | None = None,
) -> dict[str, object]:
    """Write `label_pairs` of a file (parquet, csv, tsv, json, jsonl) as parquet, or an object per
    line where `output` is a .jsonl.

    With a range each pair draws its λ and has it in columns more, the last. texts: add the columns
    prompt, chosen and rejected, in a chat as lists of messages.

    Returns counts: pairs, prompts (with a pair), ambiguous_fraction (share of pairs with
    0.05 < prob < 0.95), left_out (prompts with a single_response; where they are left out,
    responses that were cut_off and prompts with no_response), and with texts cut_off_pairs (pairs
    that hold a response that was cut off; None where the file does not say). Raises UserError on a
    bad table, or where no prompt has two responses.
    """
    responses = _read(path, reward, lambda_, texts)
    pairs = ambiguous = cut_off = 0
    with replacing(output) as temporary, pieces(temporary, output) as write:
        labelled = pair_pieces(
            responses.prompts,
            responses.scores,
            labels=labels,
            pairs_per_prompt=pairs_per_prompt,
            seed=seed,
        )
        for piece in labelled:
            write(_pair_table(responses, piece))
            pairs += len(piece.prob)
            ambiguous += int((np.abs(piece.prob - 0.5) < 0.45).sum())
            if responses.ended is not None:
                ended = responses.ended[piece.rows]
                cut_off += int((~(ended[piece.chosen] & ended[piece.rejected])).sum())
        if not pairs:
            raise no_pair()
    counts = responses.prompts.counts
    done: dict[str, object] = {
        "pairs": pairs,
        "prompts": int((counts > 1).sum()),
        "ambiguous_fraction": ambiguous / pairs,
    }
    if texts is not None:
        done["cut_off_pairs"] = None if responses.ended is None else cut_off
    return done | {"left_out": {"single_response": int((counts == 1).sum()), **responses.left_out}}


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
    responses = _read(path, reward, lambda_, None)
    rule = {"group_size": group_size, "groups_per_prompt": groups_per_prompt, "seed": seed}
    grouped = group_rows(responses.prompts, **rule)
    if not len(grouped):
        raise no_group(group_size)
    per_piece = max(1, GROUPS_AT_ONCE // groups_per_prompt)
    with replacing(output) as temporary, pieces(temporary, output) as write:
        for begin in range(0, len(grouped), per_piece):
            piece = grouped[begin : begin + per_piece]
            write(_group_table(responses, piece, derive_seed(seed, 0, "lambda")))
    left_out = len(responses.prompts.counts) - len(grouped)
    return {
        "groups": len(grouped) * groups_per_prompt,
        "prompts": len(grouped),
        "too_few_responses": left_out,
    }


@dataclass(frozen=True)
class _Responses:
    """A file's responses. frame: the needed columns; hashes: of the response ids; texts: what
    stands beside the ids; chat: whether the prompts are messages; ended: (num_responses,), where
    texts are wanted and the file says; left_out: counts of what is not among them; scores: what the
    labels' scores are made of."""

    frame: pd.DataFrame
    hashes: np.ndarray
    texts: dict[str, pd.Series]
    chat: bool
    ended: np.ndarray | None
    left_out: dict[str, int]
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
    path: Path, reward: str, lambda_: pd.Series | MultiplierRange, texts: PairTexts | None
) -> _Responses:
    """The needed columns of a file; raises UserError with all rows that are wrong."""
    utilities = lambda_.index if isinstance(lambda_, pd.Series) else lambda_.center.index
    more = () if texts is None else texts.columns
    frame = read_columns(Path(path), [*IDS, reward, *utilities, *more])
    require_columns(frame, IDS, "responses")
    left_out: dict[str, int] = {}
    ended = None if texts is None else texts.ended(frame)
    if texts is not None and texts.drop_cut_off and ended is not None:
        frame, ended, left_out = _ended_alone(frame, ended)
    hashes = require_responses(frame)
    columns, chat = ({}, False) if texts is None else texts.of(frame)
    scores = LabelScores.of(frame, reward, lambda_)
    require_scores(frame, map(str, utilities), "responses")
    return _Responses(frame, hashes, columns, chat, ended, left_out, scores)


def _ended_alone(
    frame: pd.DataFrame, ended: np.ndarray
) -> tuple[pd.DataFrame, np.ndarray, dict[str, int]]:
    """The responses that ended, and counts of the others and of prompts that have none left."""
    kept = frame[ended].reset_index(drop=True)
    counts = {
        "cut_off": int((~ended).sum()),
        "no_response": frame["prompt_id"].nunique() - kept["prompt_id"].nunique(),
    }
    if not kept["prompt_id"].duplicated().any():
        raise UserError(
            f"responses: {counts['cut_off']} of {len(frame)} were cut off, and no prompt has two "
            "that were not; sample with more max_new_tokens, or keep them (no --drop-cut-off)"
        )
    return kept, ended[ended], counts


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
        texts = (columns["prompt"], columns["response"])
        table |= pair_columns(*texts, pairs.chosen, pairs.rejected, responses.chat)
    return pa.table(table | _multiplier_columns(pairs.multipliers))


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
            **_multiplier_columns(multipliers),
        }
    )


def _multiplier_columns(drawn: pd.DataFrame) -> dict[str, pa.Array]:
    """Columns of multipliers, null where a utility does not concern the prompt."""
    return {str(name): pa.array(drawn[name].to_numpy(), from_pandas=True) for name in drawn}
