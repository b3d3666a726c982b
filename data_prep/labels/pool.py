"""Which responses of the pool a round trains on: shares by where they come from. numpy and pandas
only.

The fit's optimum is π*_λ under any law of the responses where π*_λ can be reached, so shares are
about what a limited adapter and a limited number of steps learn first: what the last policy says
now (recent), where it is most wrong (hard), what it said before (earlier), what a dataset says
(dataset), and what π_ref says (reference), which keeps every answer of the reference policy in
view.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from data_prep.labels.lagrangian import lagrangian_score
from data_prep.labels.multipliers import KAPPA, multiplier_columns
from data_prep.labels.prompt_rows import PromptRows, hashed_uniforms
from data_prep.settings import derive_seed

MAX_STRETCHES = 1000
"""More than a round's fit is cut into."""


def choose_responses(
    pool: pd.DataFrame,
    shares: Mapping[str, float] | None,
    max_per_prompt: int | None,
    *,
    reward: str,
    lambda_: pd.Series,
    beta: float,
    seed: int,
    round_number: int,
) -> pd.DataFrame:
    """Choose the rows of the pool that a round's labels are drawn from, in the pool's order.

    pool: (num_responses,) rows of a responses table with the objectives' columns. shares: of
    reference, dataset, recent, hard and earlier, summing to 1 (above 0 for what the pool holds
    before it grows), or None for every row alike. Of each prompt as many responses are taken as
    keep the shares exact without taking one twice, and at most max_per_prompt, in whole numbers
    nearest to the shares (largest remainders); a source that has a share and responses gives at
    least one, π_ref first where the cap has no room for all. A source that the prompt has none of
    leaves its share to the others. `recent` and `hard` both come from the last round: hard ones are
    drawn without replacement with odds proportional to the off-policy residual |s_λ − β/κ log
    π_θ/π_ref − its mean over a policy's responses to the prompt| (score units), π_θ the policy that
    drew them, λ and κ those of the member that it is where the row names them (columns lambda/NAME,
    kappa; null for the round's λ and 1): a member that is right at another λ is not hard. Draws
    depend on (seed, round, response ids) alone. Raises UserError as `lagrangian_score` does.
    """
    if shares is None and max_per_prompt is None:
        return pool
    limit = len(pool) if max_per_prompt is None else max_per_prompt
    rows = PromptRows.of(pool)
    prompt, uniform = (
        rows.codes,
        hashed_uniforms(derive_seed(seed, round_number, "pool-any"), rows.hashes),
    )
    if shares is None:
        return pool[_rank(prompt, uniform) < limit]
    drawn_in = _drawn_in(pool["source"])
    last = (drawn_in >= 0) & (drawn_in == drawn_in.max())
    given = (pool["source"] == "dataset").to_numpy()
    kinds = {
        "reference": (drawn_in < 0) & ~given,
        "dataset": given,
        "last": last,
        "earlier": (drawn_in >= 0) & ~last,
    }
    taken = _apportioned(
        {kind: np.bincount(prompt[of], minlength=len(rows.counts)) for kind, of in kinds.items()},
        shares,
        limit,
    )
    chosen = np.zeros(len(pool), dtype=bool)
    for kind in ("reference", "dataset", "earlier"):
        chosen |= _first(kinds[kind], prompt, uniform, taken[kind])
    from_last = taken["last"]
    if shares["hard"] and last.any():
        hardness = hashed_uniforms(derive_seed(seed, round_number, "pool-hard"), rows.hashes)
        hard = np.rint(from_last * shares["hard"] / (shares["recent"] + shares["hard"])).astype(int)
        if shares["recent"]:
            hard = np.where(from_last > 1, np.clip(hard, 1, from_last - 1), hard)
        keys = _hard(pool, prompt, last, hardness, reward, lambda_, beta)
        picked = _first(last, prompt, keys, hard)
        chosen, last, from_last = chosen | picked, last & ~picked, from_last - hard
    rows_taken: pd.DataFrame = pool[chosen | _first(last, prompt, uniform, from_last)]
    return rows_taken


def _drawn_in(source: pd.Series) -> np.ndarray:
    """When responses were drawn, (num_responses,): −1 for what was there before any round; in a
    round the stretches of its fit come before its other samples."""
    drawn = source.str.extract(r"^(?:round|trial|refresh):(?P<round>\d+)(?:\.(?P<stretch>\d+))?")
    order = pd.to_numeric(drawn["round"]).fillna(-1).to_numpy(int) * (MAX_STRETCHES + 1)
    within = source.str.startswith("refresh:")
    stretch = pd.to_numeric(drawn["stretch"]).where(within).fillna(MAX_STRETCHES).to_numpy(int)
    return np.where(order < 0, -1, order + stretch)


def responses_taken(
    available: Mapping[str, int], shares: Mapping[str, float], max_per_prompt: int | None
) -> int:
    """Count the responses `choose_responses` takes of a prompt that has so many of each source:
    reference, dataset, last (the last round's, which recent and hard share) and earlier."""
    limit = sum(available.values()) if max_per_prompt is None else max_per_prompt
    return sum(
        int(count[0])
        for count in _apportioned(
            {kind: np.array([n]) for kind, n in available.items()}, shares, limit
        ).values()
    )


def _apportioned(
    available: Mapping[str, np.ndarray], shares: Mapping[str, float], limit: int
) -> dict[str, np.ndarray]:
    """How many responses each source gives to each prompt: (num_prompts,) int by source.

    available: (num_prompts,) by source, what there is; `last` has the shares of recent and hard
    together. Where one for every source is too many for the limit, the source that gives most gives
    one less, of several the last. A prompt without any response that has a share gets none.
    """
    counts = np.stack(list(available.values()))
    of_kind = {"dataset": 0.0, **shares, "last": shares["recent"] + shares["hard"]}
    share = np.where(counts > 0, np.array([[of_kind[kind]] for kind in available]), 0.0)
    offered = share > 0
    share /= np.maximum(share.sum(axis=0), 1e-300)
    size = np.where(offered, counts / np.where(offered, share, 1.0), np.inf).min(axis=0)
    exact = np.where(offered, share * np.minimum(size, limit), 0.0)
    taken = np.floor(exact + 1e-9).astype(int)
    left = np.rint(exact.sum(axis=0)).astype(int) - taken.sum(axis=0)
    by_remainder = np.argsort(np.argsort(taken - exact, axis=0, kind="stable"), axis=0)
    taken = np.maximum(taken + (by_remainder < left), offered)
    order = np.arange(len(taken))[:, None]
    while (over := taken.sum(axis=0) > limit).any():
        largest = np.argmax(taken * len(taken) + order, axis=0)
        taken -= (order == largest) & over
    return dict(zip(available, taken, strict=True))


def _hard(
    pool: pd.DataFrame,
    prompt: np.ndarray,
    last: np.ndarray,
    uniform: np.ndarray,
    reward: str,
    lambda_: pd.Series,
    beta: float,
) -> np.ndarray:
    """Sorting key of a draw without replacement with odds proportional to the residual (Efraimidis
    and Spirakis 2006); inf elsewhere."""
    key, rows = np.full(len(pool), np.inf), pool[last]
    score = lagrangian_score(rows, reward, lambda_)
    names = map(str, lambda_.index)
    for column, (name, center) in zip(multiplier_columns(names), lambda_.items(), strict=True):
        if column in rows:
            score += ((rows[column].fillna(center) - center) * rows[name]).to_numpy(float)
    kappa = rows[KAPPA].fillna(1.0).to_numpy(float) if KAPPA in rows else 1.0
    residual = score - beta / kappa * (rows["policy_logp"] - rows["ref_logp"]).to_numpy(float)
    # log Z differs from member to member, so each has its own mean
    members = [prompt[last], rows["source"].to_numpy()]
    centred = residual - pd.Series(residual).groupby(members).transform("mean").to_numpy()
    key[last] = -np.log1p(-uniform[last]) / np.maximum(np.abs(centred), 1e-12)
    return key


def _rank(prompt: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Rank of each row by key within its prompt, from 0; of equal keys the first row first."""
    ranks = pd.Series(key).groupby(prompt).rank(method="first")
    return ranks.to_numpy(np.int64) - 1


def _first(among: np.ndarray, prompt: np.ndarray, key: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The first count[prompt] rows by key of each prompt, of those marked; a mask over all rows."""
    chosen = np.zeros(len(prompt), dtype=bool)
    rows = np.flatnonzero(among)
    if len(rows):
        rank = _rank(prompt[rows], key[rows])
        chosen[rows] = rank < count[prompt[rows]]
    return chosen
