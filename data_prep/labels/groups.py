"""Groups: responses of a prompt with their scores under λ. Pure, seeded, numpy and pandas only."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.labels.lagrangian import LabelScores
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.prompt_rows import PromptRows, hash_ids, id_array, require_responses
from data_prep.settings import derive_seed


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
    lambda_: pd.Series | MultiplierRange,
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
    of a pass, which is left out. With a range each group draws its λ by (seed, round, group_id),
    its scores are r + λ·g of that λ, and its rows have it in columns more: lambda/NAME, and kappa
    where κ is drawn (no part of the score). A prompt with fewer responses gives none. Raises
    UserError where no prompt has `group_size`.
    """
    hashes = require_responses(responses)
    scores = LabelScores.of(responses, reward, lambda_)
    rule = {
        "group_size": group_size,
        "groups_per_prompt": groups_per_prompt,
        "seed": seed,
        "round_number": round_number,
    }
    grouped = group_rows(PromptRows.of(responses, hashes), **rule)
    if not len(grouped):
        raise no_group(group_size)
    prompt_ids, rows = id_array(responses["prompt_id"]), grouped.reshape(-1)
    names = group_ids(prompt_ids.take(grouped[:, 0, 0]), groups_per_prompt)
    score, multipliers = group_scores(
        scores, grouped, names, derive_seed(seed, round_number, "lambda")
    )
    columns = {
        "prompt_id": prompt_ids.take(rows),
        "group_id": pd.Series(names).array.take(np.arange(len(rows)) // group_size),
        "response_id": id_array(responses["response_id"]).take(rows),
        "score": score,
    }
    return pd.DataFrame(columns | dict(multipliers.items()), copy=False)


def group_scores(
    scores: LabelScores, grouped: np.ndarray, names: list[str], seed: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """Score the rows of groups, each under its group's λ.

    grouped: (num_prompts, groups_per_prompt, group_size) row numbers; names: the group ids; seed:
    of the multipliers. Returns s, (num_rows,) score units, and the rows' columns of multipliers
    that were drawn, (num_rows, m [+ κ]).
    """
    rows, group_size = grouped.reshape(-1), grouped.shape[-1]
    multipliers = pd.DataFrame(index=pd.RangeIndex(len(rows)))
    if scores.law is not None:
        drawn = scores.draw(rows[::group_size], seed, hash_ids(pd.Series(names)))
        multipliers = pd.DataFrame({c: np.repeat(drawn[c].to_numpy(), group_size) for c in drawn})
    return scores.at(rows, multipliers), multipliers


def group_ids(prompt_ids: Iterable[object], groups_per_prompt: int) -> list[str]:
    """The ids of all prompts' groups, prompt after prompt."""
    return [f"{name}/{group}" for name in prompt_ids for group in range(groups_per_prompt)]


def no_group(group_size: int) -> UserError:
    return UserError(
        f"responses: no prompt has {group_size} responses, so there is no group of fit.group_size "
        f"{group_size}; sample more per prompt"
    )
