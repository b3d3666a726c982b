"""Pseudo-preference labels under given multipliers: pure, seeded, numpy and pandas only.

Source: CAID, arXiv:2505.19387, §3 (P(y1 ≻ y2 | x) = σ(s_λ(x,y1) − s_λ(x,y2)), s_λ = r + λ·g). Soft labels keep the probability itself:
the expected loss of a Bernoulli draw, without the draw's noise.
"""

from typing import Literal

import numpy as np
import pandas as pd

from data_prep.settings import UserError, derive_seed
from data_prep.tables import require_columns, require_finite, require_ids, require_unique

Labels = Literal["soft", "bernoulli", "argmax"]


def lagrangian_score(responses: pd.DataFrame, reward: str, lambda_: pd.Series) -> np.ndarray:
    """s_λ = r + Σ_i λ_i g_i, shape (num_responses,), score units. `lambda_` is indexed by utility column.

    Raises UserError on a missing column, a score that is not finite, or a negative multiplier.
    """
    columns = [reward, *lambda_.index]
    require_columns(responses, columns, "responses")
    require_finite(responses, columns, "responses")
    for name, value in lambda_.items():
        if not np.isfinite(value) or value < 0:
            raise UserError(f"lambda of {name} is {value}; multipliers are finite and ≥ 0")
    score = responses[reward].to_numpy(np.float64).copy()
    for name, value in lambda_.items():  # elementwise: the same bits in every process
        score += value * responses[name].to_numpy(np.float64)
    return score


def hashed_uniforms(seed: int, *keys: np.ndarray) -> np.ndarray:
    """One uniform in [0, 1) per row: a hash of (seed, keys), so a draw depends on its pair alone and not on the table's order."""
    state = np.full(len(keys[0]), seed, dtype=np.uint64)
    for key in keys:
        state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _tournament(size: int, pairs: int | None) -> np.ndarray:
    """The first `pairs` pairs (all if None) of a round-robin of `size` seats by the circle method, shape (n, 2).

    Every pair occurs once, and each block of size/2 pairs uses every seat once, so a prefix uses all responses equally.
    """
    seats = size + size % 2
    rounds = np.arange(seats - 1)[:, None]
    tables = np.arange(seats // 2)[None, :]
    left = np.where(tables == 0, seats - 1, (rounds + tables) % (seats - 1))
    right = (rounds - tables) % (seats - 1)
    schedule = np.stack([left, right], axis=-1).reshape(-1, 2)
    schedule = schedule[(schedule < size).all(axis=1)]
    return schedule if pairs is None else schedule[:pairs]


def _shuffled(responses: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers with each prompt's responses together, in an order that depends on (seed, response ids) alone; where each prompt
    starts, and how many it has; prompts by id."""
    prompt_codes, _ = pd.factorize(responses["prompt_id"], sort=True)
    order = np.lexsort((hashed_uniforms(seed, pd.util.hash_array(responses["response_id"].to_numpy(object))), prompt_codes))
    counts = np.bincount(prompt_codes) if len(order) else np.zeros(0, int)
    return order, np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64), counts


def choose_pairs(responses: pd.DataFrame, pairs_per_prompt: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (first, second) of the pairs to compare, each of shape (num_pairs,).

    Responses of a prompt are put in a random order that depends on (seed, response ids) alone, then meet in a round-robin; its first
    `pairs_per_prompt` pairs are taken (all if None). Prompts with one response have no pair.
    """
    order, starts, counts = _shuffled(responses, seed)
    first, second = [], []
    for size in np.unique(counts):
        if size < 2:
            continue
        schedule = _tournament(int(size), pairs_per_prompt)
        rows = starts[counts == size][:, None]
        first.append((rows + schedule[:, 0]).ravel())
        second.append((rows + schedule[:, 1]).ravel())
    if not first:
        raise UserError("responses: no prompt has two responses, so there is no pair to compare; sample more per prompt")
    first, second = np.concatenate(first), np.concatenate(second)
    sequence = np.lexsort((second, first))
    return order[first[sequence]], order[second[sequence]]


def _require_responses(responses: pd.DataFrame) -> None:
    require_columns(responses, ["prompt_id", "response_id"], "responses")
    require_ids(responses, ["prompt_id", "response_id"], "responses")
    require_unique(responses, ["response_id"], "responses")


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
    """Pseudo-preference pairs under λ (the `pairs` table: prompt_id, chosen_id, rejected_id, prob, target, margin).

    responses: (num_responses,) rows with prompt_id, response_id, the reward's and the utilities' columns.
    labels: soft (chosen = higher score, target = prob), bernoulli (chosen drawn with P, target = 1), argmax (chosen = higher
    score, target = 1; a tie is a fair coin). `prob` is always P(chosen ≻ rejected) under λ; `margin` is in score units.
    Draws are seeded by (seed, round, pair): another round or seed redraws them, another row order does not.
    """
    _require_responses(responses)
    score = lagrangian_score(responses, reward, lambda_)
    first, second = choose_pairs(responses, pairs_per_prompt, derive_seed(seed, round_number, "pairs"))
    difference = score[first] - score[second]
    ids = responses["response_id"].to_numpy(object)
    hashed = pd.util.hash_array(ids)
    coin = hashed_uniforms(derive_seed(seed, round_number, "labels"), hashed[first], hashed[second])
    probability = _sigmoid(difference)
    threshold = probability if labels == "bernoulli" else np.where(difference == 0, 0.5, difference > 0)
    first_wins = coin < threshold
    chosen, rejected = np.where(first_wins, first, second), np.where(first_wins, second, first)
    margin = np.where(first_wins, difference, -difference)
    probability = _sigmoid(margin)
    return pd.DataFrame(
        {
            "prompt_id": responses["prompt_id"].to_numpy(object)[first],
            "chosen_id": ids[chosen],
            "rejected_id": ids[rejected],
            "prob": probability,
            "target": probability if labels == "soft" else np.ones_like(probability),
            "margin": margin,
        }
    )


def label_groups(
    responses: pd.DataFrame, reward: str, lambda_: pd.Series, *, group_size: int, groups_per_prompt: int, seed: int, round_number: int = 0
) -> pd.DataFrame:
    """Groups of responses with their scores under λ (the `groups` table: prompt_id, group_id, response_id, score; score units).

    responses: (num_responses,) rows with prompt_id, response_id, the reward's and the utilities' columns. A prompt's responses are put
    into a random order that depends on (seed, round, pass, response ids) alone and cut into groups of `group_size`, pass after pass,
    until there are `groups_per_prompt`: no response comes a second time before all have come once, up to the rest of a pass, which is
    left out. A prompt with fewer responses gives none. Raises UserError where no prompt has `group_size`.
    """
    _require_responses(responses)
    score = lagrangian_score(responses, reward, lambda_)
    rows, groups = [], []
    left = np.full(responses["prompt_id"].nunique(), groups_per_prompt)  # groups still to be drawn, by prompt
    for number in range(groups_per_prompt):
        order, starts, counts = _shuffled(responses, derive_seed(seed, round_number, "groups", number))
        if counts.max() < group_size:
            raise UserError(
                f"responses: no prompt has {group_size} responses, so there is no group of fit.group_size {group_size}; sample more per "
                "prompt"
            )
        wanted = np.minimum(counts // group_size, left)
        for size in np.unique(wanted[wanted > 0]):
            chosen = wanted == size
            seats = starts[chosen][:, None] + np.arange(size * group_size)
            index = (groups_per_prompt - left[chosen])[:, None] + np.arange(size * group_size) // group_size
            rows.append(order[seats].ravel())
            groups.append(index.ravel())
        left -= wanted
        if not np.any(left[counts >= group_size]):
            break
    rows, groups = np.concatenate(rows), np.concatenate(groups)
    names = responses["prompt_id"].to_numpy(object)[rows]
    sequence = np.lexsort((groups, pd.factorize(names, sort=True)[0]))
    rows, groups, names = rows[sequence], groups[sequence], names[sequence]
    return pd.DataFrame(
        {
            "prompt_id": names,
            "group_id": [f"{name}/{group}" for name, group in zip(names, groups, strict=True)],
            "response_id": responses["response_id"].to_numpy(object)[rows],
            "score": score[rows],
        }
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def attach_text(pairs: pd.DataFrame, responses: pd.DataFrame, prompts: pd.Series | None) -> pd.DataFrame:
    """Adds `prompt, chosen, rejected` texts to a pairs table, for people and for other trainers.

    prompts: prompt text by prompt_id; None uses the responses table's own `prompt` column.
    """
    require_columns(responses, ["response"], "responses (--text)")
    texts = responses.set_index("response_id")["response"]
    if prompts is None:
        require_columns(responses, ["prompt"], "responses (--text)")
        prompts = responses.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    return pairs.assign(
        prompt=pairs["prompt_id"].map(prompts), chosen=pairs["chosen_id"].map(texts), rejected=pairs["rejected_id"].map(texts)
    )
