"""From labels and pool to the rows and batches that a fit reads: pairs as TRL lays them out, groups likewise."""

from dataclasses import dataclass

import datasets
import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.dpo_trainer import DataCollatorForPreference

from data_prep.settings import UserError


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator (chosen rows, then rejected rows, padded on the right) plus the soft target."""

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        batch["target"] = torch.tensor([example["target"] for example in examples])
        return batch


@dataclass
class GroupCollator:
    """Prompt and response ids of every response of every group, padded on the right: (num_groups · K, length); ref_logps and scores
    (num_groups, K)."""

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        rows = [(example["prompt_ids"], response) for example in examples for response in example["responses_ids"]]
        padded = lambda parts, fill: pad_sequence([torch.tensor(p) for p in parts], batch_first=True, padding_value=fill)  # noqa: E731
        ids = padded([[*prompt, *response] for prompt, response in rows], self.pad_token_id)
        mask = padded([[1] * (len(prompt) + len(response)) for prompt, response in rows], 0)
        completion = padded([[0] * len(prompt) + [1] * len(response) for prompt, response in rows], 0)
        scores = {key: torch.tensor([example[key] for example in examples]) for key in ("ref_logps", "scores")}
        return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion, **scores}


def pair_dataset(pairs: pd.DataFrame, pool: pd.DataFrame, prompt_tokens: dict[str, list[int]], max_length: int) -> datasets.Dataset:
    """Rows `prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps, target`; num_pairs rows.

    Beside them what `fit_watch` follows: `row`, `prompt_id, chosen_id, rejected_id`, `margin` (score units) and `sample_logps` (2, nats).
    Raises UserError when a pair names a response that is not in the pool, has no ref_logp, or does not fit in max_length.
    """
    chosen, rejected = (_named(pool, pairs, "pairs", column, prompt_tokens, max_length) for column in ("chosen_id", "rejected_id"))
    prompts = [prompt_tokens[pid] for pid in pairs["prompt_id"]]
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": prompts,
            "chosen_ids": [ids.tolist() for ids in chosen["token_ids"]],
            "rejected_ids": [ids.tolist() for ids in rejected["token_ids"]],
            "ref_chosen_logps": chosen["ref_logp"].to_numpy(np.float32),
            "ref_rejected_logps": rejected["ref_logp"].to_numpy(np.float32),
            "target": pairs["target"].to_numpy(np.float32),
            "row": np.arange(len(pairs)),
            **{name: pairs[name].tolist() for name in ("prompt_id", "chosen_id", "rejected_id")},
            "margin": pairs["margin"].to_numpy(np.float32),
            "sample_logps": np.stack([part["sample_logp"].to_numpy(np.float32, na_value=np.nan) for part in (chosen, rejected)], axis=1),
        }
    )


def group_dataset(groups: pd.DataFrame, pool: pd.DataFrame, prompt_tokens: dict[str, list[int]], max_length: int) -> datasets.Dataset:
    """Rows `prompt_ids, responses_ids, ref_logps, scores`, the last three with K entries each; num_groups rows.

    Beside them what `fit_watch` follows: `row`, `prompt_id, group_id`, `response_id` and `sample_logps` (K each, nats).
    Raises UserError when a group names a response that is not in the pool, has no ref_logp, or does not fit in max_length.
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
            "sample_logps": responses["sample_logp"].to_numpy(np.float32, na_value=np.nan).reshape(-1, size),
        }
    )


def _named(
    pool: pd.DataFrame, labels: pd.DataFrame, what: str, column: str, prompt_tokens: dict[str, list[int]], max_length: int
) -> pd.DataFrame:
    """The pool's rows that a column of the labels names, checked."""
    responses = pool.set_index("response_id")
    unknown = ~labels[column].isin(responses.index)
    if unknown.any():
        raise UserError(f"{what}: {column} {labels[column][unknown].iloc[0]!r} is not in the pool ({unknown.sum()} rows)")
    chosen = responses.loc[labels[column]]
    if chosen["ref_logp"].isna().any():
        raise UserError(f"pool: ref_logp is null for responses that the {what} use; prepare the run again")
    longest = max(len(prompt_tokens[pid]) + len(ids) for pid, ids in zip(labels["prompt_id"], chosen["token_ids"], strict=True))
    if longest > max_length:
        raise UserError(
            f"fit.max_length: a prompt with its response has {longest} tokens, over {max_length}; nothing is truncated, raise it"
        )
    return chosen
