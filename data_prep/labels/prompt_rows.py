"""Responses by prompt, and draws that are hashes of ids: no draw depends on a table's order."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_prep.tables import require_columns, require_ids, require_unique


def hashed_uniforms(seed: int, *keys: np.ndarray) -> np.ndarray:
    """Draw one uniform in [0, 1) per row: a hash of (seed, keys), so a draw depends on its
    row's keys alone and not on the table's order."""
    state = np.full(len(keys[0]), seed, dtype=np.uint64)
    for key in keys:
        state = (state ^ key) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


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


def id_array(column: pd.Series) -> pd.api.extensions.ExtensionArray | np.ndarray:
    """Give a column's ids, texts as pandas' own str: taking rows of those makes no Python
    objects."""
    texts = pd.Series(column.to_numpy(object) if column.dtype != "str" else column)
    values: pd.api.extensions.ExtensionArray = texts.array
    return values
