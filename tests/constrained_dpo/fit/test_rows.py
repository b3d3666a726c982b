"""Rows of a fit: what a prompt with many pairs weighs."""

import copy

import pandas as pd
import pytest
import torch

from constrained_dpo.fit.losses import pair_loss
from constrained_dpo.fit.rows import pair_dataset
from data_prep.labels.preferences import label_pairs
from tests.helpers.fits import PROMPT_TABLE, built_trainer, prompt_tokens


@pytest.fixture(scope="module")
def uneven(pool):
    """All pairs of three responses of four prompts, and of twelve of the others: 3 and 66."""
    few = set(PROMPT_TABLE["prompt_id"][:4])
    place = pool.groupby("prompt_id").cumcount()
    return pool[(place < 3) | ~pool["prompt_id"].isin(few)].reset_index(drop=True)


def test_all_prompts_weigh_the_same_however_many_pairs_they_have(
    plain_policy, pool, uneven, tmp_path
):
    """The loss of all rows together is the mean over prompts of their own pairs' mean."""
    lambda_ = pd.Series({"harmless": 0.5})
    pairs = label_pairs(uneven, "helpful", lambda_, labels="soft", pairs_per_prompt=None, seed=0)
    rows = pair_dataset(pairs, pool, prompt_tokens(plain_policy), 16)
    counts = pairs.groupby("prompt_id").size()
    assert counts.min() <= 3 and counts.max() > 40
    policy = copy.deepcopy(plain_policy)
    with built_trainer(policy, rows, tmp_path, batch_size=len(rows), beta=1.0) as trainer:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        # another π_ref, so that log π_θ/π_ref is not 0 although nothing was trained
        noise = torch.randn(batch["ref_logps"].shape, generator=torch.Generator().manual_seed(0))
        batch["ref_logps"] = batch["ref_logps"] + noise
        loss = trainer.compute_loss(trainer.model, batch).item()
    each = pair_loss(noise[:, 1] - noise[:, 0], batch["target"]).numpy()
    prompts = pairs["prompt_id"].to_numpy()[batch["row"].numpy()]
    expected = pd.Series(each).groupby(prompts).mean().mean()
    assert loss == pytest.approx(expected, abs=1e-4) and abs(each.mean() - expected) > 1e-3
