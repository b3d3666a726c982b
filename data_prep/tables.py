"""The tables' schemas and their validation.

Long format, one row per response (or pair), parquet with zstd. Shapes: a responses table has
`num_responses` rows; log-probabilities are in nats, objective columns in the score units of their
scorer.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa

from data_prep.errors import UserError

SPLITS = (
    "fit",
    "dual",
    "test",
)  # `dual` is a fixed subset of the fit prompts; `test` is never in either


PROMPTS = {"prompt_id": "string", "prompt": "string", "split": "string"}


# Of a prepared run's prompts, one column more: how the policy reads them.
TOKEN_IDS = "token_ids"


RESPONSES = {
    "prompt_id": "string",
    "response_id": "string",
    "response": "string",
    "token_ids": "tokens",
    # ended with EOS (its id is the last of token_ids), as against cut off at max_new_tokens
    "ended": "bool",
    "source": "string",  # reference, dataset or round:K
    # log-probability under the law it was drawn from (temperature, top_p); null for dataset
    # rows
    "sample_logp": "logp",
    "policy_logp": "logp",  # log π_θ at T = 1
    "ref_logp": "logp",  # log π_ref at T = 1
    # Σ_t KL(π_θ ‖ π_ref) over the vocabulary at each prefix, T = 1; null for dataset rows
    "path_kl": "nats",
}


# Sums over a response's tokens that test whether they were drawn from the law that is stated
# (data_prep.sampling.draws), with their variances, and how many tokens have probability 0 under it
# (outside the nucleus; they are in no sum).
DRAWS = ("surprisal_excess", "surprisal_variance", "eos_excess", "eos_variance", "outside_tokens")


# Columns more where a server sampled (data_prep.sampling.served): its own log-probability, whether
# the ids are surely those that were drawn, and its URL.
SERVED = ("server_logp", "exact_ids", "server_url", *DRAWS)


PAIRS = {
    "prompt_id": "string",
    "chosen_id": "string",
    "rejected_id": "string",
    "prob": "probability",  # P(chosen ≻ rejected) under λ
    # what the loss uses: prob for soft labels, 1 for drawn or given ones
    "target": "probability",
    "margin": "float",  # s_λ(chosen) − s_λ(rejected), score units
}


GROUPS = {
    "prompt_id": "string",
    "group_id": "string",
    "response_id": "string",
    "score": "float",  # s_λ, score units
}


# Pairs and groups that draw their multipliers hold them in columns more: λ of each utility in
# lambda/NAME (≥ 0, reward per utility; s_λ is of the row's own λ; null where the utility does not
# concern the prompt), and where it is drawn kappa = β_recipe/β (> 0; no part of the score). All
# rows of a group have the same.
MULTIPLIER_PREFIX = "lambda/"


# A utility of some prompts only is named UTILITY.CATEGORY; its column is null for all responses to
# a prompt that it does not concern.
CATEGORY_MARK = "."


RESERVED_NAMES = frozenset(
    {*PROMPTS, *RESPONSES, *SERVED, *PAIRS, *GROUPS, "chosen", "rejected", "kappa"}
)


ARROW = {"string": pa.string(), "tokens": pa.list_(pa.int32()), "bool": pa.bool_()}


def _rows(mask: np.ndarray, frame: pd.DataFrame, id_column: str | None) -> str:
    """Names up to three offending rows, by id where the table has one."""
    where = np.flatnonzero(mask)
    names = [
        f"{frame[id_column].iloc[i]!r}"
        if id_column is not None and id_column in frame
        else f"row {i}"
        for i in where[:3]
    ]
    return ", ".join(names) + (f" and {len(where) - 3} more" if len(where) > 3 else "")


def require_columns(frame: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Raises UserError when a column is missing or the table is empty."""
    missing = [c for c in columns if c not in frame.columns]
    if missing and len(frame.columns):
        raise UserError(
            f"{where}: missing column {', '.join(missing)}; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
    if len(frame) == 0:
        raise UserError(f"{where}: the table has no rows")


def require_unique(frame: pd.DataFrame, columns: list[str], where: str) -> None:
    duplicated = frame.duplicated(columns).to_numpy()
    if duplicated.any():
        rows = _rows(duplicated, frame, columns[-1])
        raise UserError(f"{where}: duplicated {' + '.join(columns)}: {rows}; make the ids unique")


def require_ids(frame: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Raises UserError naming the rows whose id is null."""
    for column in columns:
        null = frame[column].isna().to_numpy()
        if null.any():
            raise UserError(
                f"{where}: column {column} is null in {_rows(null, frame, None)}; give every row "
                "its id"
            )


def require_finite(
    frame: pd.DataFrame, columns: Iterable[str], where: str, id_column: str | None = None
) -> None:
    """Raises UserError naming column and rows where a value is not a finite number."""
    for column in columns:
        values = pd.to_numeric(frame[column], errors="coerce").to_numpy(
            dtype=np.float64, na_value=np.nan
        )
        bad = ~np.isfinite(values)
        if bad.any():
            rows = _rows(bad, frame, id_column or "response_id")
            raise UserError(
                f"{where}: column {column} is not a finite number in {rows}; score these rows "
                "again or remove them"
            )


def require_scores(
    frame: pd.DataFrame, columns: Iterable[str], where: str, *, shard: bool = False
) -> None:
    """Raises UserError as `require_finite` does, but lets a utility of some prompts only be null
    for all responses to a prompt; in a shard, for every prompt."""
    columns = list(columns)
    require_finite(frame, [c for c in columns if CATEGORY_MARK not in c], where)
    for column in columns:
        if CATEGORY_MARK not in column:
            continue
        concerned = frame[column].notna()
        if shard and not concerned.any():
            continue
        if not concerned.any():
            raise UserError(f"{where}: column {column} is null in every row; score them again")
        require_finite(frame[concerned], [column], where)
        odd = (concerned != concerned.groupby(frame["prompt_id"]).transform("first")).to_numpy()
        if odd.any():
            raise UserError(
                f"{where}: column {column} is null for some responses to a prompt and not for "
                f"others: {_rows(odd, frame, 'response_id')}; score them again"
            )


def score_values(frame: pd.DataFrame, column: str) -> np.ndarray:
    """Give a column's scores as they enter s_λ, (num_rows,) float64: 0 where a utility does not
    concern the prompt."""
    values = frame[column].to_numpy(np.float64, na_value=np.nan)
    return np.nan_to_num(values) if CATEGORY_MARK in column else values


def _require_schema(
    frame: pd.DataFrame, schema: dict[str, str], where: str, id_column: str
) -> None:
    require_columns(frame, schema, where)
    for column, kind in schema.items():
        if kind in ("string", "tokens", "bool"):
            null = frame[column].isna().to_numpy()
            if null.any():
                raise UserError(
                    f"{where}: column {column} is null in {_rows(null, frame, id_column)}"
                )
        elif kind in ("float", "probability"):
            require_finite(frame, [column], where, id_column)
            if kind == "probability":
                outside = ~frame[column].between(0, 1).to_numpy()
                if outside.any():
                    raise UserError(
                        f"{where}: column {column} is not in [0, 1] in "
                        f"{_rows(outside, frame, id_column)}"
                    )


def validate_prompts(frame: pd.DataFrame, where: str, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Checks a prompts table (`prompt_id, prompt, split`); returns it with its columns in schema
    order, then `columns`, lists of categories."""
    _require_schema(frame, PROMPTS, where, "prompt_id")
    require_unique(frame, ["prompt_id"], where)
    unknown = ~frame["split"].isin(SPLITS).to_numpy()
    if unknown.any():
        raise UserError(
            f"{where}: split is not one of {', '.join(SPLITS)} in "
            f"{_rows(unknown, frame, 'prompt_id')}"
        )
    return frame[[*PROMPTS, *columns]]


def validate_responses(frame: pd.DataFrame, objectives: Iterable[str], where: str) -> pd.DataFrame:
    """Check a responses table: schema, unique ids, finite scores, log-probabilities finite and ≤ 0,
    path_kl finite and ≥ 0 (or null)."""
    objectives = list(objectives)
    _require_schema(frame, RESPONSES, where, "response_id")
    require_columns(frame, objectives, where)
    require_unique(frame, ["response_id"], where)
    require_scores(frame, objectives, where, shard=True)
    for column in ("sample_logp", "policy_logp", "ref_logp"):
        values = frame[column].astype("float64").to_numpy()
        bad = ~np.isnan(values) & ((values > 1e-3) | np.isinf(values))
        if bad.any():
            raise UserError(
                f"{where}: {column} is not a log-probability in {_rows(bad, frame, 'response_id')}"
            )
    path = frame["path_kl"].astype("float64").to_numpy()
    bad = ~np.isnan(path) & ((path < -1e-3) | np.isinf(path))
    if bad.any():
        rows = _rows(bad, frame, "response_id")
        raise UserError(f"{where}: path_kl is not a divergence in {rows}")
    empty = (frame["token_ids"].map(len) == 0).to_numpy()
    if empty.any():
        raise UserError(f"{where}: token_ids is empty in {_rows(empty, frame, 'response_id')}")
    extra = [c for c in frame.columns if c not in RESPONSES and c not in objectives]
    return frame[[*RESPONSES, *objectives, *extra]]


def without_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """A responses table as it was drawn: no objective columns, no split."""
    return frame[[*RESPONSES, *(c for c in SERVED if c in frame)]]


def _require_multipliers(frame: pd.DataFrame, where: str, id_column: str) -> list[str]:
    """The columns of rows' own multipliers, none where they have none; raises UserError where λ is
    not finite and ≥ 0 (by category it may be null), or κ not finite and > 0."""
    columns = [
        c for c in map(str, frame.columns) if c.startswith(MULTIPLIER_PREFIX) or c == "kappa"
    ]
    for column in columns:
        values = pd.to_numeric(frame[column], errors="coerce").to_numpy(
            dtype=np.float64, na_value=np.nan
        )
        bad = ~np.isfinite(values) | ((values <= 0) if column == "kappa" else (values < 0))
        if CATEGORY_MARK in column:
            bad &= frame[column].notna().to_numpy()
        if bad.any():
            raise UserError(
                f"{where}: column {column} is not a finite number "
                f"{'> 0' if column == 'kappa' else '≥ 0'} in {_rows(bad, frame, id_column)}; "
                "relabel the responses"
            )
    return columns


def validate_pairs(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Check a pairs table; return it as it is. Rows may have multipliers of their own.

    Raises UserError on a missing column, a null or duplicated id, or a bad number.
    """
    _require_schema(frame, PAIRS, where, "chosen_id")
    _require_multipliers(frame, where, "chosen_id")
    require_unique(frame, ["prompt_id", "chosen_id", "rejected_id"], where)
    return frame


def validate_groups(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Check a groups table; return it as it is. Rows may have multipliers of their own.

    Raises UserError on a missing column, a null or duplicated id, a bad number, groups of different
    sizes, or a group whose rows differ in their multipliers.
    """
    _require_schema(frame, GROUPS, where, "response_id")
    multipliers = _require_multipliers(frame, where, "response_id")
    require_unique(frame, ["group_id", "response_id"], where)
    if frame.groupby("group_id").size().nunique() > 1:
        raise UserError(
            f"{where}: groups differ in size; every group_id must have the same number of rows"
        )
    for column in multipliers:
        first = frame.groupby("group_id")[column].transform("first")
        differs = ((frame[column] != first) & (frame[column].notna() | first.notna())).to_numpy()
        if differs.any():
            raise UserError(
                f"{where}: column {column} differs within the group of "
                f"{_rows(differs, frame, 'group_id')}; a group has one λ: relabel the responses"
            )
    return frame
