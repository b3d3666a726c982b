"""The responses that a family's members are distilled on, kept beside its weights."""

from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.fit.family import Family, family_columns
from data_prep.readers.tables import read_parquet, write_parquet

CONTEXTS_FILE = "contexts.parquet"

SEQUENCES = 32
"""In a step of a distillation."""

OF_A_PROMPT, IN_ALL = 64, 8192
"""Responses that are kept, at most, and one of each prompt. A distillation reads few thousands."""


def label_contexts(
    labels: pd.DataFrame, pool: pd.DataFrame, prompt_tokens: dict[str, list[int]], family: Family
) -> pd.DataFrame:
    """Take responses of a fit's labels: at random OF_A_PROMPT of each prompt, fewer of many.

    Returns rows of prompt_id, prompt_ids and response_ids (token ids), and `concerns`, the names of
    the constraints that concern the prompt.
    """
    named = [c for c in ("response_id", "chosen_id", "rejected_id") if c in labels]
    rows = labels.melt("prompt_id", named, value_name="id")
    most = max(1, min(OF_A_PROMPT, IN_ALL // labels["prompt_id"].nunique()))
    rows = rows.sample(frac=1, random_state=0)  # of pairs, chosen and rejected ones alike
    rows = rows.drop_duplicates("id").groupby("prompt_id", sort=False).head(most)
    given = family_columns(labels, family.names).notna().groupby(labels["prompt_id"]).first()
    concerns = given.apply(lambda row: [str(name) for name in row.index[row]], axis=1)
    tokens = pool.set_index("response_id")["token_ids"]
    return pd.DataFrame(
        {
            "prompt_id": rows["prompt_id"].to_numpy(),
            "prompt_ids": [np.array(prompt_tokens[pid], np.int32) for pid in rows["prompt_id"]],
            "response_ids": tokens.loc[rows["id"]].to_numpy(),
            "concerns": concerns.loc[rows["prompt_id"]].to_numpy(),
        }
    )


def write_contexts(folder: Path, contexts: pd.DataFrame) -> None:
    """Put the table beside a family's weights."""
    write_parquet(contexts, folder / CONTEXTS_FILE)


def read_contexts(folder: Path) -> pd.DataFrame:
    """Read the table of a family's folder. Raises UserError where it is gone or damaged."""
    return read_parquet(folder / CONTEXTS_FILE)


def context_gates(
    contexts: pd.DataFrame, family: Family, lambda_: pd.Series, kappa: float
) -> np.ndarray:
    """Compute the gates of each row at λ and κ, (num_rows, blocks)."""
    concerned = contexts["concerns"].map(set)
    columns = {
        name: np.where(concerned.map(lambda names, n=name: n in names), lambda_[name], np.nan)
        for name in family.names
    }
    return family.gates(pd.DataFrame(columns), kappa)
