"""A tiny pool, the settings of a fit, fits and trainers."""

import functools
import json
from contextlib import contextmanager

import datasets
import numpy as np
import pandas as pd
import torch

from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.build import build_trainer
from constrained_dpo.fit.family import Family
from constrained_dpo.fit.trainer import FitPlan
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


@functools.cache
def _recipe_fit():
    return load_recipe(QUICKSTART).fit


def fit_settings(**changes):
    return _recipe_fit().model_copy(
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
    logps = response_logps(policy.model, *flat, pad_id=0, batch_size=8)
    rows = {
        "prompt_ids": prompts,
        "responses_ids": responses,
        "ref_logps": logps.astype(np.float32).reshape(-1, 2),
    }
    ones = np.ones(count, np.float32)
    return datasets.Dataset.from_dict(rows | {"target": ones, "weight": ones})


def make_family(*names: str, kappa=None, rank: int = LORA.r) -> Family:
    """A family of these constraints, its gates in units of 0.5, 0.6, ..."""
    names = names or ("harmless",)
    units = {name: 0.5 + 0.1 * number for number, name in enumerate(names)}
    low, high = ({n: factor * unit for n, unit in units.items()} for factor in (1 / 3, 3.0))
    return Family(units=units, rank=rank, low=low, high=high, kappa=kappa)


def gated_rows(rows: datasets.Dataset, family: Family, seed: int = 0) -> datasets.Dataset:
    """The rows, each under multipliers and κ of its own: `gates`, `kappa`, and `lambda/NAME`."""
    rng = np.random.default_rng(seed)
    lambda_ = pd.DataFrame({n: rng.uniform(0.0, 1.5, len(rows)) for n in family.units})
    kappa = rng.uniform(0.5, 1.5, len(rows))
    columns = {"gates": family.gates(lambda_, kappa).astype(np.float32)}
    columns |= {"kappa": kappa.astype(np.float32)}
    columns |= {f"lambda/{name}": lambda_[name].to_numpy() for name in lambda_}
    return datasets.Dataset.from_dict(rows.to_dict() | columns)


def randomize(trainer, std: float = 0.3) -> None:
    """Moves the adapter away from π_ref."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def fit_log(
    policy,
    pool,
    folder,
    *,
    labels=None,
    lora=LORA,
    previous=None,
    checkpoints=None,
    plan=None,
    **changes,
) -> dict:
    """A fit at folder/adapter, with more fields of its plan; returns its training log."""
    plan = FitPlan(
        fit_settings(**changes),
        lora,
        beta=0.25,
        seed=0,
        output=folder / "adapter",
        previous_adapter=previous,
        checkpoints=checkpoints,
        **plan or {},
    )
    labels = make_pairs(pool) if labels is None else labels
    fit_adapter(policy, labels, pool, prompt_tokens(policy), plan)
    return json.loads((plan.output / "training_log.json").read_text())


@contextmanager
def built_trainer(
    policy,
    rows,
    folder,
    *,
    lora=LORA,
    beta=0.25,
    seed=0,
    previous=None,
    held_out=None,
    resumed=False,
    family=None,
    **changes,
):
    """The trainer of a fit; the policy is the plain base again afterwards."""
    settings = fit_settings(**changes)
    plan = FitPlan(
        settings, lora, beta, seed, output=folder, previous_adapter=previous, family=family
    )
    forward = policy.model.__dict__.get("forward")
    trainer = build_trainer(policy, rows, plan, held_out, resumed)
    try:
        yield trainer
    finally:
        trainer.model.unload()
        policy.model.__dict__.pop("forward", None)
        if forward is not None:
            policy.model.forward = forward
