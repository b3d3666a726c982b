"""From labels and pool to the rows and batches that a fit reads. A row is a prompt with K
responses: a pair (K = 2) or a group."""

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from constrained_dpo.fit.family import Family, family_columns
from data_prep.errors import UserError
from data_prep.labels.multipliers import KAPPA

UNSCORED = -100
"""The target of a position whose next token is nobody's response token."""


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Rows of different lengths as one tensor (num_rows, longest), filled on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def labels_of(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Give `ref_logps` (num_rows, K), and `target` and `weight` (num_rows,) of pairs or `scores`
    (num_rows, K) of groups; `gates` (num_rows, blocks) and `kappa` (num_rows,) of a family's rows;
    beside them what no loss reads: the numbers of the rows, a pair's `margin` (num_rows,), and
    `sample_logps` (num_rows, K)."""
    keys = (
        *("ref_logps", "target", "weight", "scores", "gates", "kappa"),
        *("row", "margin", "sample_logps"),
    )
    return {
        key: torch.tensor([example[key] for example in examples])
        for key in keys
        if key in examples[0]
    }


def row_lengths(rows: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every row's prompt (num_rows,), and of its responses (num_rows, K)."""
    responses = np.array([[len(ids) for ids in responses] for responses in rows["responses_ids"]])
    return np.array([len(ids) for ids in rows["prompt_ids"]]), responses


@dataclass
class PaddedCollator:
    """Prompt and response together, once per response: (num_rows · K, length), padded on the
    right."""

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        sequences = [
            (example["prompt_ids"], response)
            for example in examples
            for response in example["responses_ids"]
        ]
        ids = padded([[*prompt, *response] for prompt, response in sequences], self.pad_token_id)
        mask = padded([[1] * (len(prompt) + len(response)) for prompt, response in sequences], 0)
        labels = padded(
            [[UNSCORED] * len(prompt) + list(response) for prompt, response in sequences], UNSCORED
        )
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **labels_of(examples)}


class LengthBuckets(torch.utils.data.Sampler[int]):
    """A random order of rows in which the rows of one optimizer step are of about equal length.

    A permutation drawn from (seed, epoch) is cut into blocks of BLOCK steps; in a block rows are
    sorted by length and cut into steps, and the steps come in random order. Rows too few for a step
    are the permutation's last, so any: a step of few rows weighs each the more. lengths:
    (num_rows,) tokens of the rows in the layout that the batches have.
    """

    BLOCK = 50

    def __init__(self, lengths: np.ndarray, rows_per_step: int, seed: int) -> None:
        self.lengths = lengths
        self.rows_per_step, self.seed, self.epoch = rows_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, size = rng.permutation(len(self.lengths)), self.rows_per_step
        order, rest = np.split(order, [len(order) // size * size])
        for block in np.split(order, range(self.BLOCK * size, len(order), self.BLOCK * size)):
            steps = block[np.argsort(self.lengths[block], kind="stable")].reshape(-1, size)
            yield from steps[rng.permutation(len(steps))].ravel().tolist()
        yield from rest.tolist()


def pair_dataset(
    pairs: pd.DataFrame,
    pool: pd.DataFrame,
    prompt_tokens: dict[str, list[int]],
    max_length: int,
    family: Family | None = None,
) -> datasets.Dataset:
    """Make rows `prompt_ids, responses_ids, ref_logps, target, weight`, chosen before rejected;
    num_pairs rows.

    family: of a conditional fit; its rows have `gates` and `kappa` too, by each pair's multipliers.
    weight: of the row in the loss, 1 on average; all prompts together weigh the same, however many
    pairs each has, as the expectation over prompts in the Lagrangian does. Beside them what
    `watch` follows: `row`, `prompt_id, chosen_id, rejected_id`, `margin` (score units) and
    `sample_logps` (2, nats). Raises UserError when a pair names a response that is not in the pool,
    has no ref_logp, or does not fit in max_length.
    """
    sides = [
        _named(pool, pairs, "pairs", column, prompt_tokens, max_length)
        for column in ("chosen_id", "rejected_id")
    ]
    chosen, rejected = (side["token_ids"] for side in sides)
    count = pairs.groupby("prompt_id")["prompt_id"].transform("size")
    weight = len(pairs) / pairs["prompt_id"].nunique() / count
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": [prompt_tokens[pid] for pid in pairs["prompt_id"]],
            "responses_ids": [
                [c.tolist(), r.tolist()] for c, r in zip(chosen, rejected, strict=True)
            ],
            "ref_logps": np.stack(
                [side["ref_logp"].to_numpy(np.float32) for side in sides], axis=1
            ),
            "target": pairs["target"].to_numpy(np.float32),
            "weight": weight.to_numpy(np.float32),
            "row": np.arange(len(pairs)),
            **{name: pairs[name].tolist() for name in ("prompt_id", "chosen_id", "rejected_id")},
            "margin": pairs["margin"].to_numpy(np.float32),
            "sample_logps": np.stack(
                [side["sample_logp"].to_numpy(np.float32, na_value=np.nan) for side in sides],
                axis=1,
            ),
            **_gates(pairs, family),
        }
    )


def group_dataset(
    groups: pd.DataFrame,
    pool: pd.DataFrame,
    prompt_tokens: dict[str, list[int]],
    max_length: int,
    family: Family | None = None,
) -> datasets.Dataset:
    """Rows `prompt_ids, responses_ids, ref_logps, scores`, the last three with K entries each;
    num_groups rows.

    family: of a conditional fit; its rows have `gates` and `kappa` too, by each group's
    multipliers.

    Beside them what `watch` follows: `row`, `prompt_id, group_id`, `response_id` and
    `sample_logps` (K each, nats). Raises UserError when a group names a response that is not in the
    pool, has no ref_logp, or does not fit in max_length.
    """
    groups = groups.sort_values("group_id", kind="stable")
    responses = _named(pool, groups, "groups", "response_id", prompt_tokens, max_length)
    size = int((groups["group_id"] == groups["group_id"].iloc[0]).sum())
    ids = [tokens.tolist() for tokens in responses["token_ids"]]
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": [prompt_tokens[pid] for pid in groups["prompt_id"].iloc[::size]],
            "responses_ids": [ids[i : i + size] for i in range(0, len(ids), size)],
            "ref_logps": responses["ref_logp"].to_numpy(np.float32).reshape(-1, size),
            "scores": groups["score"].to_numpy(np.float32).reshape(-1, size),
            "row": np.arange(len(groups) // size),
            **{name: groups[name].iloc[::size].tolist() for name in ("prompt_id", "group_id")},
            "response_id": groups["response_id"].to_numpy(object).reshape(-1, size).tolist(),
            "sample_logps": responses["sample_logp"]
            .to_numpy(np.float32, na_value=np.nan)
            .reshape(-1, size),
            **_gates(groups.iloc[::size], family),
        }
    )


def _gates(labels: pd.DataFrame, family: Family | None) -> dict[str, np.ndarray]:
    """`gates` (num_rows, blocks) and `kappa` (num_rows,) of a family's rows; none otherwise."""
    if family is None:
        return {}
    kappa = labels[KAPPA].to_numpy(np.float64) if KAPPA in labels else np.ones(len(labels))
    gates = family.gates(family_columns(labels, family.names), kappa)
    return {"gates": gates.astype(np.float32), "kappa": kappa.astype(np.float32)}


def _named(
    pool: pd.DataFrame,
    labels: pd.DataFrame,
    what: str,
    column: str,
    prompt_tokens: dict[str, list[int]],
    max_length: int,
) -> pd.DataFrame:
    """The pool's rows that a column of the labels names, checked."""
    responses = pool.set_index("response_id")
    unknown = ~labels[column].isin(responses.index)
    if unknown.any():
        raise UserError(
            f"{what}: {column} {labels[column][unknown].iloc[0]!r} is not in the pool "
            f"({unknown.sum()} rows)"
        )
    chosen = responses.loc[labels[column]]
    if chosen["ref_logp"].isna().any():
        raise UserError(
            f"pool: ref_logp is null for responses that the {what} use; prepare the run again"
        )
    longest = max(
        len(prompt_tokens[pid]) + len(ids)
        for pid, ids in zip(labels["prompt_id"], chosen["token_ids"], strict=True)
    )
    if longest > max_length:
        raise UserError(
            f"fit.max_length: a prompt with its response has {longest} tokens, over {max_length}; "
            "nothing is truncated, raise it"
        )
    return chosen
