"""Prompts that a fit measures itself on: the residual, the split, the early stop."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import EvalPrediction

from constrained_dpo.estimates.certificate import off_policy_residual
from constrained_dpo.fit.holdout import residual, split_held_out, squared_residuals
from constrained_dpo.fit.rows import group_dataset, pair_dataset
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from data_prep.labels.groups import label_groups
from data_prep.models.adapters import attached_adapter
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import fit_log, make_pairs, prompt_tokens


@pytest.mark.parametrize("size", [2, 5])
def test_the_residual_of_rows_is_that_of_the_certificate(size):
    """Groups that hold all of a prompt's responses, and prompts of two responses as pairs: the same
    number as on the table."""
    rng, names = np.random.default_rng(0), ("r", "g", "policy_logp", "ref_logp")
    problem = ConstrainedProblem("r", 0.3, (Constraint("g", margin=0.1),))
    columns = {name: rng.normal(size=6 * size) for name in names}
    table = pd.DataFrame({"prompt_id": np.repeat(list("abcdef"), size), **columns})
    expected = off_policy_residual(table, problem, pd.Series({"g": 0.7}))
    tensor = {name: torch.tensor(values.reshape(6, size)) for name, values in columns.items()}
    scores = tensor["r"] + 0.7 * tensor["g"]
    rows = [{"scores": scores}]
    if size == 2:
        rows.append(
            {
                "target": scores[:, 0],
                "weight": np.ones(len(scores)),
                "margin": scores[:, 0] - scores[:, 1],
            }
        )
    for inputs in rows:
        squares = squared_residuals(tensor["policy_logp"] - tensor["ref_logp"], inputs, 0.3)
        measured = residual(EvalPrediction(squares.numpy(), label_ids=np.arange(6)))
        assert measured["residual"] == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def rows(plain_policy, pool):
    return pair_dataset(make_pairs(pool), pool, prompt_tokens(plain_policy), 16)


def held_out_prompts(rows, pool, share, seed=5) -> set[str]:
    return set(split_held_out(rows, pool["prompt_id"], share, seed)[1]["prompt_id"])


def test_held_out_prompts_are_whole(rows, pool):
    train, held_out = split_held_out(rows, pool["prompt_id"], 0.25, seed=5)
    assert len(set(held_out["prompt_id"])) == 2 and len(train) + len(held_out) == len(rows)
    assert not set(train["prompt_id"]) & set(held_out["prompt_id"])
    assert split_held_out(rows, pool["prompt_id"], 0.0, seed=5) == (rows, None)


def test_held_out_prompts_depend_on_the_seed_and_not_on_the_labels(plain_policy, rows, pool):
    groups = label_groups(
        pool, "helpful", pd.Series({"harmless": 0.1}), group_size=4, groups_per_prompt=2, seed=1
    )
    other_rows = group_dataset(groups, pool, prompt_tokens(plain_policy), 16)
    assert held_out_prompts(other_rows, pool, 0.25) == held_out_prompts(rows, pool, 0.25)
    assert len({frozenset(held_out_prompts(rows, pool, 0.25, seed)) for seed in range(8)}) > 1


def test_a_prompt_without_rows_changes_nothing_for_the_others(rows, pool):
    first, second = (held_out_prompts(rows, pool, share / 8) for share in (1, 2))
    missing = rows.filter(lambda row: row["prompt_id"] not in first)
    assert held_out_prompts(missing, pool, 0.25) == second - first
    none = r"fit.holdout: none of the 1 held-out prompts \(of 8\) has responses enough"
    with pytest.raises(UserError, match=none):
        held_out_prompts(missing, pool, 1 / 8)
    with pytest.raises(UserError, match=r"fit.holdout: 0.98 of 8 prompts leaves none"):
        held_out_prompts(rows, pool, 0.98)


@pytest.mark.parametrize("loss", ["logistic", "listwise"])
def test_a_fit_stops_when_the_held_out_residual_rises_and_keeps_the_best_adapter(
    plain_policy, pool, tmp_path, loss
):
    """Few rows and a large rate overfit; the residual is measured again on the saved adapter, by
    the sampler's own forward."""
    labels, settings = make_pairs(pool), {}
    if loss == "listwise":
        lambda_ = pd.Series({"harmless": 0.5})
        sizes = {"group_size": 4, "groups_per_prompt": 3}
        labels = label_groups(pool, "helpful", lambda_, **sizes, seed=0)
        settings = {"loss": loss, "group_size": 4}
    settings |= {"steps": 80, "learning_rate": 1e-2, "holdout": 0.25, "early_stop": 2}
    log = fit_log(plain_policy, pool, tmp_path, labels=labels, eval_steps=5, **settings)
    measured = {row["step"]: row["eval_residual"] for row in log["log"] if "eval_residual" in row}
    best, last = min(measured, key=measured.get), max(measured)
    record = log["held_out"]
    assert list(measured) == list(range(0, last + 1, 5)) and last < 80
    assert record["kept_step"] == best == last - 10 and record["stopped_at"] == last
    assert record["residual"] == measured[best] and record["prompts"] == 2
    again = residual_of_adapter(plain_policy, tmp_path / "adapter", labels, pool)
    assert record["residual"] == pytest.approx(again, rel=1e-4)


def residual_of_adapter(policy, adapter, labels, pool) -> float:
    """Of the held-out rows, by a forward without the trainer."""
    tokens, responses = prompt_tokens(policy), pool.set_index("response_id")
    grouped = "group_id" in labels
    rows = (group_dataset if grouped else pair_dataset)(labels, pool, tokens, 16)
    held_out = split_held_out(rows, pool["prompt_id"], 0.25, seed=0)[1]
    pairs = (held_out[name] for name in ("chosen_id", "rejected_id")) if not grouped else None
    ids = held_out["response_id"] if grouped else zip(*pairs, strict=True)
    squares = []
    with attached_adapter(policy, adapter) as model:
        for prompt, names in zip(held_out["prompt_id"], ids, strict=True):
            chosen = responses.loc[list(names)]
            drawn = [t.tolist() for t in chosen["token_ids"]]
            prompts = [tokens[prompt]] * len(drawn)
            logps = response_logps(model, prompts, drawn, pad_id=0, batch_size=8)
            score = chosen["helpful"] + 0.5 * chosen["harmless"]
            squares.append((score - 0.25 * (logps - chosen["ref_logp"])).var(ddof=1))
    return float(np.sqrt(np.mean(squares)))


def test_held_out_without_an_early_stop_is_only_measured(plain_policy, pool, tmp_path):
    log = fit_log(plain_policy, pool, tmp_path, steps=7, holdout=0.25, eval_steps=3)
    assert [row["step"] for row in log["log"] if "eval_residual" in row] == [0, 3, 6, 7]
    assert log["held_out"]["kept_step"] == 7 and log["held_out"]["stopped_at"] is None
