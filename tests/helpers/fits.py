"""A tiny pool and the settings of a fit."""

import datasets
import numpy as np
import pandas as pd

from constrained_dpo.recipe.load import load_recipe
from data_prep.labels.preferences import label_pairs
from data_prep.models.settings import LoraSettings
from data_prep.quickstart import PROMPTS, harmless, helpful
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import SamplingSettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.paths import QUICKSTART

LORA = LoraSettings(r=4, alpha=8, dropout=0.0)


PROMPT_TABLE = pd.DataFrame({"prompt_id": PROMPTS["train"][:8], "prompt": PROMPTS["train"][:8]})


SAMPLING = SamplingSettings(max_new_tokens=3, batch_size=128)


def fit_settings(**changes):
    return load_recipe(QUICKSTART).fit.model_copy(
        update={"steps": 8, "batch_size": 4, "warmup_steps": 0} | changes
    )


def prompt_tokens(policy) -> dict[str, list[int]]:
    return {p: policy.tokenizer(p)["input_ids"] for p in PROMPT_TABLE["prompt"]}


def make_pool(policy, adapter=None, seed=1) -> pd.DataFrame:
    pool = Sampler(policy, prompt_tokens(policy), SAMPLING).draw(
        PROMPT_TABLE, responses_per_prompt=12, adapter=adapter, source="reference", seed=seed
    )
    texts = pool["response"].tolist()
    return pool.assign(
        helpful=helpful(pool["prompt_id"].tolist(), texts),
        harmless=harmless(pool["prompt_id"].tolist(), texts),
    )


def make_pairs(pool, labels="soft"):
    return label_pairs(
        pool, "helpful", pd.Series({"harmless": 0.5}), labels=labels, pairs_per_prompt=6, seed=0
    )


def ragged_rows(policy, count: int, seed: int) -> datasets.Dataset:
    """Token rows of ragged lengths (prompts 2–9, responses 1–12 tokens) with their own reference
    log-probabilities."""
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(2, len(policy.tokenizer), rng.integers(low, high)).tolist()
    prompts = [ids(2, 10) for _ in range(count)]
    responses = [[ids(1, 13), ids(1, 13)] for _ in range(count)]
    flat = [p for p in prompts for _ in range(2)], [ids for pair in responses for ids in pair]
    logps, _ = response_logps(policy.model, *flat, pad_id=0, batch_size=8)
    rows = {
        "prompt_ids": prompts,
        "responses_ids": responses,
        "ref_logps": logps.astype(np.float32).reshape(-1, 2),
    }
    return datasets.Dataset.from_dict(rows | {"target": np.ones(count, np.float32)})
