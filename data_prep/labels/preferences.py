"""Pseudo-preference labels under given multipliers: pure, seeded, numpy and pandas only.

Source: CAID, arXiv:2505.19387, §3 (P(y1 ≻ y2 | x) = σ(s_λ(x,y1) − s_λ(x,y2)), s_λ = r + λ·g). Soft
labels keep the probability itself: the expected loss of a Bernoulli draw, without the draw's noise.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from data_prep.errors import UserError
from data_prep.labels.lagrangian import lagrangian_score
from data_prep.settings import derive_seed
from data_prep.tables import require_columns, require_ids, require_unique

Labels = Literal["soft", "bernoulli", "argmax"]


PIECE_PAIRS = 1 << 18
"""Pairs labelled at once (more where one prompt has more): what bounds the memory, and small enough
for a processor's cache."""


def hashed_uniforms(seed: int, *keys: np.ndarray) -> np.ndarray:
    """One uniform in [0, 1) per row: a hash of (seed, keys), so a draw depends on its pair alone
    and not on the table's order."""
    state = np.full(len(keys[0]), seed, dtype=np.uint64)
    for key in keys:
        state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _tournament(size: int, pairs: int | None) -> np.ndarray:
    """The first `pairs` pairs (all if None) of a round-robin of `size` seats by the circle method,
    shape (n, 2).

    Every pair occurs once, and each block of size/2 pairs uses every seat once, so a prefix uses
    all responses equally.
    """
    seats = size + size % 2
    rounds = np.arange(seats - 1)[:, None]
    tables = np.arange(seats // 2)[None, :]
    left = np.where(tables == 0, seats - 1, (rounds + tables) % (seats - 1))
    right = (rounds - tables) % (seats - 1)
    schedule = np.stack([left, right], axis=-1).reshape(-1, 2)
    schedule = schedule[(schedule < size).all(axis=1)]
    return schedule if pairs is None else schedule[:pairs]


@dataclass(frozen=True)
class PromptRows:
    """Rows of a table of responses by prompt, prompts in ascending order of their id.

    codes: (num_responses,) the row's prompt as a number; hashes: (num_responses,) 64-bit hashes of
    the response ids; starts, counts: (num_prompts,) where a prompt's rows start once they lie
    together, and how many they are.
    """

    codes: np.ndarray
    hashes: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, responses: pd.DataFrame, hashes: np.ndarray | None = None) -> "PromptRows":
        codes = _codes(responses["prompt_id"].array)
        counts = np.bincount(codes) if len(codes) else np.zeros(0, int)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        return cls(
            codes, hash_ids(responses["response_id"]) if hashes is None else hashes, starts, counts
        )

    def shuffled(self, seed: int) -> np.ndarray:
        """Row numbers with each prompt's responses together, in an order that depends on (seed,
        response ids) alone."""
        together = np.argsort(self.codes, kind="stable")
        uniforms, order = (
            hashed_uniforms(seed, self.hashes)[together],
            np.empty(len(together), np.int64),
        )
        for size in np.unique(
            self.counts
        ):  # many short sorts beside each other are several times faster than one long one
            seats = self.starts[self.counts == size][:, None] + np.arange(size)
            places = np.argsort(uniforms[seats], axis=1, kind="stable")
            order[seats] = together[np.take_along_axis(seats, places, axis=1)]
        return order


def _codes(ids: pd.api.extensions.ExtensionArray) -> np.ndarray:
    """The ids' ranks, shape (len(ids),); only the first of a run of equal ids is looked up."""
    heads = (
        np.flatnonzero(np.concatenate([[True], np.asarray(ids[1:] != ids[:-1], bool)]))
        if len(ids)
        else np.zeros(0, int)
    )
    return np.repeat(
        pd.factorize(pd.Series(ids.take(heads)), sort=True)[0], np.diff(heads, append=len(ids))
    )


def hash_ids(ids: pd.Series) -> np.ndarray:
    """64-bit hashes of ids, shape (len(ids),): the same in every process."""
    return pd.util.hash_array(ids.to_numpy(object), categorize=False)


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs of some prompts. rows: (num_rows,) numbers of these prompts' rows; chosen,
    rejected: (num_pairs,) places in `rows`; prob, target, margin: (num_pairs,), the columns of a
    pairs table."""

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    prob: np.ndarray
    target: np.ndarray
    margin: np.ndarray


def pair_pieces(
    prompts: PromptRows,
    score: np.ndarray,
    *,
    labels: Labels,
    pairs_per_prompt: int | None,
    seed: int,
    round_number: int = 0,
) -> Iterator[Pairs]:
    """`label_pairs` in pieces of whole prompts with at most PIECE_PAIRS pairs (or one prompt);
    score: (num_responses,), s_λ.

    Responses of a prompt are put in a random order that depends on (seed, response ids) alone, then
    meet in a round-robin; its first `pairs_per_prompt` pairs are taken (all if None). Prompts with
    one response have no pair.
    """
    order, counts = prompts.shuffled(derive_seed(seed, round_number, "pairs")), prompts.counts
    schedules = {
        int(size): _tournament(int(size), pairs_per_prompt)
        for size in np.unique(counts)
        if size > 1
    }
    schedules = {
        size: schedule[np.lexsort(schedule.T[::-1])] for size, schedule in schedules.items()
    }
    number = np.zeros(counts.max(initial=0) + 1, np.int64)
    number[list(schedules)] = [len(schedule) for schedule in schedules.values()]
    ends, begin = np.cumsum(number[counts]), 0
    while begin < len(counts):
        before = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, before + PIECE_PAIRS, side="right")), begin + 1)
        piece = slice(begin, stop)
        first, second = np.empty((2, ends[stop - 1] - before), np.int64)
        first_row, starts = prompts.starts[begin], prompts.starts[piece] - prompts.starts[begin]
        offsets = ends[piece] - number[counts[piece]] - before
        for size, schedule in schedules.items():
            met = counts[piece] == size
            places = offsets[met][:, None] + np.arange(len(schedule))
            first[places] = starts[met][:, None] + schedule[:, 0]
            second[places] = starts[met][:, None] + schedule[:, 1]
        rows = order[first_row : first_row + counts[piece].sum()]
        begin = stop
        if len(first):
            yield _label(
                rows,
                first,
                second,
                score[rows],
                prompts.hashes[rows],
                labels,
                derive_seed(seed, round_number, "labels"),
            )


def _label(
    rows: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    score: np.ndarray,
    hashes: np.ndarray,
    labels: Labels,
    seed: int,
) -> Pairs:
    difference = score[first] - score[second]
    if labels == "bernoulli":
        first_wins = hashed_uniforms(seed, hashes[first], hashes[second]) < expit(difference)
    else:
        first_wins = difference > 0
        tied = np.flatnonzero(difference == 0)
        first_wins[tied] = hashed_uniforms(seed, hashes[first[tied]], hashes[second[tied]]) < 0.5
    margin = np.where(first_wins, difference, -difference)
    prob = expit(margin)
    target = prob if labels == "soft" else np.ones_like(prob)
    return Pairs(
        rows,
        np.where(first_wins, first, second),
        np.where(first_wins, second, first),
        prob,
        target,
        margin,
    )


def require_responses(responses: pd.DataFrame) -> np.ndarray:
    """The response ids' hashes; raises UserError unless the table has a prompt_id and a
    response_id, unique, in every row."""
    require_columns(responses, ["prompt_id", "response_id"], "responses")
    require_ids(responses, ["prompt_id", "response_id"], "responses")
    hashes = hash_ids(responses["response_id"])
    if not all_differ(hashes.copy()):
        require_unique(responses, ["response_id"], "responses")
    return hashes


def all_differ(hashes: np.ndarray) -> bool:
    """Whether no two hashes are equal: then no two ids are. Sorts the array."""
    hashes.sort()
    return not (hashes[1:] == hashes[:-1]).any()


def no_pair() -> UserError:
    return UserError(
        "responses: no prompt has two responses, so there is no pair to compare; sample more per "
        "prompt"
    )


def no_group(group_size: int) -> UserError:
    return UserError(
        f"responses: no prompt has {group_size} responses, so there is no group of fit.group_size "
        f"{group_size}; sample more per prompt"
    )


def _ids(column: pd.Series) -> pd.api.extensions.ExtensionArray | np.ndarray:
    """The column's values, texts as pandas' own str: taking rows of those makes no Python
    objects."""
    texts = pd.Series(column.to_numpy(object) if column.dtype != "str" else column)
    values: pd.api.extensions.ExtensionArray = texts.array
    return values


def label_pairs(
    responses: pd.DataFrame,
    reward: str,
    lambda_: pd.Series,
    *,
    labels: Labels,
    pairs_per_prompt: int | None,
    seed: int,
    round_number: int = 0,
) -> pd.DataFrame:
    """Pseudo-preference pairs under λ (the `pairs` table: prompt_id, chosen_id, rejected_id, prob,
    target, margin).

    responses: (num_responses,) rows with prompt_id, response_id, the reward's and the utilities'
    columns. labels: soft (chosen = higher score, target = prob), bernoulli (chosen drawn with P,
    target = 1), argmax (chosen = higher score, target = 1; a tie is a fair coin). `prob` is always
    P(chosen ≻ rejected) under λ; `margin` is in score units. Draws are seeded by (seed, round,
    pair): another round or seed redraws them, another row order does not. Pairs come by prompt, in
    ascending order of prompt_id. Raises UserError where no prompt has two responses.
    """
    hashes = require_responses(responses)
    score = lagrangian_score(responses, reward, lambda_)
    pieces = list(
        pair_pieces(
            PromptRows.of(responses, hashes),
            score,
            labels=labels,
            pairs_per_prompt=pairs_per_prompt,
            seed=seed,
            round_number=round_number,
        )
    )
    if not pieces:
        raise no_pair()
    chosen, rejected = (
        np.concatenate([p.rows[getattr(p, side)] for p in pieces])
        for side in ("chosen", "rejected")
    )
    ids = _ids(responses["response_id"])
    columns = {
        "prompt_id": _ids(responses["prompt_id"]).take(chosen),
        "chosen_id": ids.take(chosen),
        "rejected_id": ids.take(rejected),
    }
    numbers = {
        name: np.concatenate([getattr(p, name) for p in pieces])
        for name in ("prob", "target", "margin")
    }
    return pd.DataFrame(columns | numbers, copy=False)


def group_rows(
    prompts: PromptRows,
    *,
    group_size: int,
    groups_per_prompt: int,
    seed: int,
    round_number: int = 0,
) -> np.ndarray:
    """Row numbers of `label_groups`' groups, shape (prompts that have group_size responses,
    groups_per_prompt, group_size), int64."""
    enough = np.flatnonzero(prompts.counts >= group_size)
    starts, whole = (
        prompts.starts[enough],
        prompts.counts[enough] // group_size,
    )  # groups in one pass
    rows = np.empty((len(enough), groups_per_prompt, group_size), np.int64)
    drawn, number = np.zeros(len(enough), np.int64), 0
    while (drawn < groups_per_prompt).any():
        order = prompts.shuffled(derive_seed(seed, round_number, "groups", number))
        taken = np.minimum(whole, groups_per_prompt - drawn)
        for count in np.unique(taken[taken > 0]):
            at = np.flatnonzero(taken == count)
            seats = starts[at][:, None] + np.arange(count * group_size)
            rows[at[:, None], drawn[at][:, None] + np.arange(count)] = order[seats].reshape(
                len(at), count, group_size
            )
        drawn, number = drawn + taken, number + 1
    return rows


def label_groups(
    responses: pd.DataFrame,
    reward: str,
    lambda_: pd.Series,
    *,
    group_size: int,
    groups_per_prompt: int,
    seed: int,
    round_number: int = 0,
) -> pd.DataFrame:
    """Groups of responses with their scores under λ (the `groups` table: prompt_id, group_id,
    response_id, score; score units).

    responses: (num_responses,) rows with prompt_id, response_id, the reward's and the utilities'
    columns. A prompt's responses are put into a random order that depends on (seed, round, pass,
    response ids) alone and cut into groups of `group_size`, pass after pass, until there are
    `groups_per_prompt`: no response comes a second time before all have come once, up to the rest
    of a pass, which is left out. A prompt with fewer responses gives none. Raises UserError where
    no prompt has `group_size`.
    """
    hashes = require_responses(responses)
    score = lagrangian_score(responses, reward, lambda_)
    rule = {
        "group_size": group_size,
        "groups_per_prompt": groups_per_prompt,
        "seed": seed,
        "round_number": round_number,
    }
    grouped = group_rows(PromptRows.of(responses, hashes), **rule)
    if not len(grouped):
        raise no_group(group_size)
    prompt_ids, rows = _ids(responses["prompt_id"]), grouped.reshape(-1)
    names = pd.Series(group_ids(prompt_ids.take(grouped[:, 0, 0]), groups_per_prompt)).array
    columns = {
        "prompt_id": prompt_ids.take(rows),
        "group_id": names.take(np.arange(len(rows)) // group_size),
        "response_id": _ids(responses["response_id"]).take(rows),
        "score": score[rows],
    }
    return pd.DataFrame(columns, copy=False)


def group_ids(prompt_ids: Iterable[object], groups_per_prompt: int) -> list[str]:
    """The ids of all prompts' groups, prompt after prompt."""
    return [f"{name}/{group}" for name in prompt_ids for group in range(groups_per_prompt)]
