"""Pseudo-preference pairs under given multipliers: pure, seeded, numpy and pandas only.

Source: CAID, arXiv:2505.19387, §3 (P(y1 ≻ y2 | x) = σ(s_λ(x,y1) − s_λ(x,y2)), s_λ = r + λ·g). Soft
labels keep the probability itself: the expected loss of a Bernoulli draw, without the draw's noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from data_prep.errors import UserError
from data_prep.labels.lagrangian import LabelScores
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.prompt_rows import PromptRows, hashed_uniforms, id_array, require_responses
from data_prep.settings import derive_seed

Labels = Literal["soft", "bernoulli", "argmax"]


PIECE_PAIRS = 1 << 18
"""Pairs labelled at once (more where one prompt has more): what bounds the memory, and small enough
for a processor's cache."""


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
class Pairs:
    """Labelled pairs of some prompts. rows: (num_rows,) numbers of these prompts' rows; chosen,
    rejected: (num_pairs,) places in `rows`; prob, target, margin: (num_pairs,), the columns of a
    pairs table; multipliers: its columns of multipliers that were drawn, (num_pairs, m [+ κ])."""

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    prob: np.ndarray
    target: np.ndarray
    margin: np.ndarray
    multipliers: pd.DataFrame


def pair_pieces(
    prompts: PromptRows,
    scores: LabelScores,
    *,
    labels: Labels,
    pairs_per_prompt: int | None,
    seed: int,
    round_number: int = 0,
) -> Iterator[Pairs]:
    """`label_pairs` in pieces of whole prompts with at most PIECE_PAIRS pairs (or one prompt);
    scores: of the prompts' responses, in the order of `prompts`.

    Responses of a prompt are put in a random order that depends on (seed, response ids) alone, then
    meet in a round-robin; its first `pairs_per_prompt` pairs are taken (all if None). Prompts with
    one response have no pair.
    """
    order, counts = prompts.shuffled(derive_seed(seed, round_number, "pairs")), prompts.counts
    schedules = _schedules(counts, pairs_per_prompt)
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
                scores.take(rows),
                prompts.hashes[rows],
                labels,
                _Seeds.of(seed, round_number),
            )


def _schedules(counts: np.ndarray, pairs: int | None) -> dict[int, np.ndarray]:
    """The pairs that a prompt's seats meet in, sorted, by the prompt's number of responses."""
    schedules = {int(size): _tournament(int(size), pairs) for size in np.unique(counts) if size > 1}
    return {size: schedule[np.lexsort(schedule.T[::-1])] for size, schedule in schedules.items()}


@dataclass(frozen=True)
class _Seeds:
    """Seeds of a round's labels and of its pairs' multipliers."""

    labels: int
    multipliers: int

    @classmethod
    def of(cls, seed: int, round_number: int) -> "_Seeds":
        return cls(
            derive_seed(seed, round_number, "labels"), derive_seed(seed, round_number, "lambda")
        )


def _label(
    rows: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    scores: LabelScores,
    hashes: np.ndarray,
    labels: Labels,
    seeds: _Seeds,
) -> Pairs:
    """Label the pairs (first, second), places in `rows`; scores, hashes: of the responses in
    `rows`."""
    seed, meeting = seeds.labels, (hashes[first], hashes[second])
    multipliers = scores.draw(first, seeds.multipliers, *meeting)
    difference = scores.at(first, multipliers) - scores.at(second, multipliers)
    if labels == "bernoulli":
        first_wins = hashed_uniforms(seed, *meeting) < expit(difference)
    else:
        first_wins = difference > 0
        tied = np.flatnonzero(difference == 0)
        first_wins[tied] = hashed_uniforms(seed, *(key[tied] for key in meeting)) < 0.5
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
        multipliers,
    )


def no_pair() -> UserError:
    return UserError(
        "responses: no prompt has two responses, so there is no pair to compare; sample more per "
        "prompt"
    )


def label_pairs(
    responses: pd.DataFrame,
    reward: str,
    lambda_: pd.Series | MultiplierRange,
    *,
    labels: Labels,
    pairs_per_prompt: int | None,
    seed: int,
    round_number: int = 0,
) -> pd.DataFrame:
    """Pseudo-preference pairs under λ (the `pairs` table: prompt_id, chosen_id, rejected_id, prob,
    target, margin).

    responses: (num_responses,) rows with prompt_id, response_id, the reward's and the utilities'
    columns. lambda_: by utility; with a range each pair draws its λ, stands under s = r + λ·g of
    that λ, and has it in columns more: lambda/NAME, and kappa where κ is drawn (no part of s).
    labels: soft (chosen = higher score, target = prob), bernoulli (chosen drawn with P, target =
    1), argmax (chosen = higher score, target = 1; a tie is a fair coin). `prob` is always
    P(chosen ≻ rejected) under λ; `margin` is in score units. Draws are seeded by (seed, round,
    pair): another round or seed redraws them, another row order does not. Pairs come by prompt, in
    ascending order of prompt_id. Raises UserError where no prompt has two responses.
    """
    hashes = require_responses(responses)
    scores = LabelScores.of(responses, reward, lambda_)
    pieces = list(
        pair_pieces(
            PromptRows.of(responses, hashes),
            scores,
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
    ids = id_array(responses["response_id"])
    columns = {
        "prompt_id": id_array(responses["prompt_id"]).take(chosen),
        "chosen_id": ids.take(chosen),
        "rejected_id": ids.take(rejected),
    }
    numbers = {
        name: np.concatenate([getattr(p, name) for p in pieces])
        for name in ("prob", "target", "margin")
    }
    multipliers = pd.concat([p.multipliers for p in pieces], ignore_index=True)
    return pd.DataFrame(columns | numbers | dict(multipliers.items()), copy=False)
