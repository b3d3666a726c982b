"""What happens over the life of a fit: its length by round, the early stop, the log, numbers that
are not finite."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from constrained_dpo.estimates.certificate import off_policy_residual
from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.holdout import residual, split_held_out, squared_residuals
from constrained_dpo.fit.rows import group_dataset, pair_dataset
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.fit.watch import kl_estimate
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.create import init_run
from data_prep.errors import UserError
from data_prep.labels.preferences import label_groups
from data_prep.models.adapters import attached_adapter
from data_prep.quickstart import build_policy
from data_prep.sampling.logprobs import response_logps
from tests.helpers.cli import cdpo
from tests.helpers.fits import LORA, fit_settings, make_pairs, make_pool, prompt_tokens
from tests.helpers.paths import QUICKSTART, SMALL


@pytest.fixture(scope="module")
def pool(quickstart_policy) -> pd.DataFrame:
    return make_pool(quickstart_policy)


def fitted(
    policy, pool, folder, *, lora=LORA, previous=None, labels=None, checkpoints=None, **changes
) -> dict:
    """A fit at folder/adapter; returns its training log."""
    fit_adapter(
        policy,
        make_pairs(pool) if labels is None else labels,
        pool,
        prompt_tokens(policy),
        FitPlan(
            fit_settings(**changes),
            lora,
            beta=0.25,
            seed=0,
            previous_adapter=previous,
            output=folder / "adapter",
            checkpoints=checkpoints,
        ),
    )
    return json.loads((folder / "adapter" / "training_log.json").read_text())


def weights(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# The length of a round's fit.


def test_later_rounds_get_their_share_of_steps_and_of_epochs():
    def steps(*shares: str) -> list[int]:
        fit = load_recipe(QUICKSTART, [*shares, "fit.steps=9", "fit.warmup_steps=0"]).fit
        return [fit.in_round(t).steps for t in range(4)]

    assert steps() == [9, 9, 9, 9]
    assert steps("fit.later_rounds=0.5") == [9, 4, 4, 4]
    assert steps("fit.later_rounds=[0.5, 0.01]") == [9, 4, 1, 1]
    shorter = load_recipe(
        QUICKSTART, ["fit.later_rounds=[0.5, 0.005]"]
    ).fit  # 200 steps, 10 of warm-up
    assert [shorter.in_round(t).warmup_steps for t in range(3)] == [10, 5, 0] and shorter.in_round(
        2
    ).steps == 1
    passes = load_recipe(
        QUICKSTART, ["fit.steps=null", "fit.epochs=3", "fit.later_rounds=[1, 0.5]"]
    ).fit
    assert [passes.in_round(t).epochs for t in range(4)] == [3, 3, 1.5, 1.5] and passes.in_round(
        3
    ).steps is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.later_rounds=0", "greater than 0"),
        ("fit.later_rounds=50", "less than or equal to 1"),
        ("fit.later_rounds=[]", "later_rounds is an empty list"),
        ("fit.early_stop=3", "there are none; set fit.holdout"),
        ("fit.eval_steps=7", "there are none; set fit.holdout"),
        ("fit.holdout=1", "less than 1"),
        ("fit.save_steps=0", "greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(QUICKSTART, [override])


def test_a_recipe_that_does_not_use_the_new_keys_is_the_same_recipe():
    plain, named = (
        load_recipe(QUICKSTART),
        load_recipe(QUICKSTART, ["fit.later_rounds=1.0", "fit.holdout=0", "fit.save_steps=null"]),
    )
    assert plain.hash() == named.hash() != load_recipe(QUICKSTART, ["fit.later_rounds=0.5"]).hash()


# Held-out prompts and the early stop.


def test_the_residual_of_rows_is_that_of_the_certificate():
    """Groups that hold all of a prompt's responses, and prompts of two responses as pairs: the same
    number as on the table."""
    rng, problem = (
        np.random.default_rng(0),
        ConstrainedProblem("r", 0.3, (Constraint("g", margin=0.1),)),
    )
    for size in (2, 5):
        columns = {
            name: rng.normal(size=6 * size) for name in ("r", "g", "policy_logp", "ref_logp")
        }
        table = pd.DataFrame({"prompt_id": np.repeat(list("abcdef"), size), **columns})
        expected = off_policy_residual(table, problem, pd.Series({"g": 0.7}))
        tensor = {name: torch.tensor(values.reshape(6, size)) for name, values in columns.items()}
        scores = tensor["r"] + 0.7 * tensor["g"]
        log_ratio = tensor["policy_logp"] - tensor["ref_logp"]
        found = [squared_residuals(log_ratio, {"scores": scores}, 0.3)]
        if size == 2:
            found.append(
                squared_residuals(
                    log_ratio, {"target": scores[:, 0], "margin": scores[:, 0] - scores[:, 1]}, 0.3
                )
            )
        for squares in found:
            assert residual(_prediction(squares))["residual"] == pytest.approx(expected, rel=1e-12)


def _prediction(squares):
    from transformers import EvalPrediction

    return EvalPrediction(predictions=squares.numpy(), label_ids=np.arange(len(squares)))


def test_held_out_prompts_are_whole_seeded_and_the_same_in_every_round(quickstart_policy, pool):
    tokens = prompt_tokens(quickstart_policy)
    rows = pair_dataset(make_pairs(pool), pool, tokens, 16)
    prompts = pool["prompt_id"]
    train, held_out = split_held_out(rows, prompts, 0.25, seed=5)
    assert len(set(held_out["prompt_id"])) == 2 and len(train) + len(held_out) == len(rows)
    assert not set(train["prompt_id"]) & set(held_out["prompt_id"])
    other_labels = group_dataset(
        label_groups(
            pool, "helpful", pd.Series({"harmless": 0.1}), group_size=4, groups_per_prompt=2, seed=1
        ),
        pool,
        tokens,
        16,
    )
    assert set(split_held_out(other_labels, prompts, 0.25, seed=5)[1]["prompt_id"]) == set(
        held_out["prompt_id"]
    )
    assert (
        len(
            {
                frozenset(split_held_out(rows, prompts, 0.25, seed)[1]["prompt_id"])
                for seed in range(8)
            }
        )
        > 1
    )
    assert split_held_out(rows, prompts, 0.0, seed=5) == (rows, None)
    with pytest.raises(UserError, match=r"fit.holdout: 0.98 of 8 prompts leaves none"):
        split_held_out(rows, prompts, 0.98, seed=5)

    ranked = [
        set(split_held_out(rows, prompts, share / 8, seed=5)[1]["prompt_id"])
        for share in range(1, 8)
    ]
    missing = rows.filter(
        lambda row: row["prompt_id"] not in ranked[0]
    )  # a prompt that has no rows in another round
    assert (
        set(split_held_out(missing, prompts, 0.25, seed=5)[1]["prompt_id"]) == ranked[1] - ranked[0]
    )
    with pytest.raises(
        UserError,
        match=r"fit.holdout: none of the 1 held-out prompts \(of 8\) has responses enough",
    ):
        split_held_out(missing, prompts, 1 / 8, seed=5)


@pytest.mark.parametrize("loss", ["logistic", "listwise"])
def test_a_fit_stops_when_the_held_out_residual_rises_and_keeps_the_best_adapter(
    quickstart_policy, pool, tmp_path, loss
):
    """Few rows and a large rate overfit; the residual is measured again on the saved adapter, by
    the sampler's own forward."""
    tokens, labels = prompt_tokens(quickstart_policy), make_pairs(pool)
    if loss == "listwise":
        labels = label_groups(
            pool, "helpful", pd.Series({"harmless": 0.5}), group_size=4, groups_per_prompt=3, seed=0
        )
    log = fitted(
        quickstart_policy,
        pool,
        tmp_path,
        labels=labels,
        loss=loss,
        group_size=4 if loss == "listwise" else 2,
        steps=80,
        learning_rate=1e-2,
        holdout=0.25,
        early_stop=2,
        eval_steps=5,
    )
    measured = {row["step"]: row["eval_residual"] for row in log["log"] if "eval_residual" in row}
    best = min(measured, key=measured.get)
    record = log["held_out"]
    assert list(measured) == list(range(0, max(measured) + 1, 5)) and max(measured) < 80
    assert record["kept_step"] == best == max(measured) - 10 and record["stopped_at"] == max(
        measured
    )
    assert record["residual"] == measured[best] and record["prompts"] == 2

    rows = (group_dataset if loss == "listwise" else pair_dataset)(labels, pool, tokens, 16)
    held_out = split_held_out(rows, pool["prompt_id"], 0.25, seed=0)[1]
    named = pool.set_index("response_id")
    ids = (
        list(held_out["response_id"])
        if loss == "listwise"
        else list(zip(held_out["chosen_id"], held_out["rejected_id"], strict=True))
    )
    squares = []
    with attached_adapter(quickstart_policy, tmp_path / "adapter") as model:
        for prompt, responses in zip(held_out["prompt_id"], ids, strict=True):
            chosen = named.loc[list(responses)]
            drawn = [t.tolist() for t in chosen["token_ids"]]
            logps, _ = response_logps(
                model, [tokens[prompt]] * len(drawn), drawn, pad_id=0, batch_size=8
            )
            rest = (
                chosen["helpful"] + 0.5 * chosen["harmless"] - 0.25 * (logps - chosen["ref_logp"])
            )
            squares.append(rest.var(ddof=1))
    assert record["residual"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-4)


def test_held_out_without_an_early_stop_is_only_measured(quickstart_policy, pool, tmp_path):
    log = fitted(quickstart_policy, pool, tmp_path, steps=7, holdout=0.25, eval_steps=3)
    assert [row["step"] for row in log["log"] if "eval_residual" in row] == [0, 3, 6, 7]
    assert log["held_out"]["kept_step"] == 7 and log["held_out"]["stopped_at"] is None


# The log.


def test_every_step_is_logged(quickstart_policy, pool, tmp_path):
    log = fitted(quickstart_policy, pool, tmp_path, steps=6, gradient_accumulation=2)
    rows = [row for row in log["log"] if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = {
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "kl",
        "kl_ess",
    }
    assert all(
        names <= row.keys() and all(math.isfinite(row[name]) for name in names) for row in rows
    )
    assert abs(rows[0]["kl"]) < 1e-5  # the adapter starts as π_ref
    assert all(1 <= row["kl_ess"] <= 8 + 1e-6 for row in rows)

    log = fitted(quickstart_policy, pool.assign(sample_logp=np.nan), tmp_path / "dataset", steps=2)
    assert all(
        "kl" not in row and "loss" in row for row in log["log"][:2]
    )  # responses whose law nobody knows


def test_the_kl_estimate_is_of_the_policy_whatever_drew_the_responses():
    """Against the exact KL of two categorical laws; responses from a third, a tenth of them of
    unknown law."""
    rng = np.random.default_rng(1)
    policy, reference, law = (np.log(rng.dirichlet(np.full(6, 3.0))) for _ in range(3))
    exact = float(np.exp(policy) @ (policy - reference))
    drawn = rng.choice(6, size=200_000, p=np.exp(law))
    known = np.where(rng.random(len(drawn)) < 0.1, np.nan, law[drawn])
    found = kl_estimate(
        torch.tensor(policy[drawn]), torch.tensor(reference[drawn]), torch.tensor(known)
    )
    unweighted = float((policy - reference)[drawn].mean())
    assert found["kl"].item() == pytest.approx(exact, abs=0.01) and abs(unweighted - exact) > 0.1
    assert 1 < found["kl_ess"].item() < 0.91 * len(drawn)


# Numbers that are not finite.


def test_a_loss_that_is_not_finite_leaves_its_batch(quickstart_policy, pool, tmp_path):
    pairs = make_pairs(pool)
    with pytest.raises(
        FloatingPointError,
        match=r"fit: the loss is (nan|inf) at step (\d+); its batch is in .*bad_batch.json",
    ) as stop:
        fitted(
            quickstart_policy,
            pool,
            tmp_path,
            learning_rate=1e30,
            lr_scheduler="constant",
            max_grad_norm=1e30,
        )
    assert not (tmp_path / "adapter").exists()
    batch = json.loads((tmp_path / "bad_batch.json").read_text())
    assert f"at step {batch['step']};" in str(stop.value) and len(batch["rows"]) == 4
    named = pool.set_index("response_id")
    for row in batch["rows"]:
        pair = pairs.iloc[row["row"]]
        assert (row["prompt_id"], row["chosen_id"], row["rejected_id"]) == (
            pair["prompt_id"],
            pair["chosen_id"],
            pair["rejected_id"],
        )
        assert row["responses_ids"][0] == named.loc[row["chosen_id"], "token_ids"].tolist()
        assert row["ref_logps"][1] == pytest.approx(named.loc[row["rejected_id"], "ref_logp"])
        assert row["target"] == pytest.approx(pair["target"]) and row["margin"] == pytest.approx(
            pair["margin"]
        )
    assert any(value == "nan" for row in batch["rows"] for value in row["policy_logps"])

    fitted(quickstart_policy, pool, tmp_path)  # the next fit that succeeds takes the file away
    assert not (tmp_path / "bad_batch.json").exists()


def test_a_gradient_that_is_not_finite_stops_a_fit_whose_loss_is_finite(
    quickstart_policy, pool, tmp_path
):
    """An adapter whose two factors are 1e-25 and 1e25 of the usual: the same policy, and a gradient
    that overflows."""
    from safetensors.torch import load_file, save_file

    fitted(quickstart_policy, pool, tmp_path, learning_rate=5e-3)
    shutil.move(tmp_path / "adapter", tmp_path / "previous")
    file = tmp_path / "previous" / "adapter_model.safetensors"
    save_file(
        {n: v * (1e-25 if "lora_A" in n else 1e25) for n, v in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is (inf|nan) at step 1;"):
        fitted(
            quickstart_policy,
            pool,
            tmp_path,
            previous=tmp_path / "previous",
            gradient_accumulation=2,
            steps=3,
            save_steps=1,
            checkpoints=tmp_path / "checkpoints",
        )
    batch = json.loads((tmp_path / "bad_batch.json").read_text())
    assert len(batch["rows"]) == 8  # both forwards of the step
    assert all(math.isfinite(value) for row in batch["rows"] for value in row["policy_logps"])
    assert not list(
        (tmp_path / "checkpoints").glob("checkpoint-*")
    )  # what such a step did is not saved


def test_a_run_whose_fit_diverges_fails_in_one_line_and_can_be_resumed(tmp_path):
    overrides = [
        *SMALL,
        "fit.learning_rate=1e30",
        "fit.max_grad_norm=1e30",
        "fit.warmup_steps=0",
        f"policy.model={build_policy()}",
    ]
    run = init_run(QUICKSTART, tmp_path / "run", overrides)
    for _ in range(2):
        said = cdpo("round", run.path, check=1).stderr.strip().splitlines()
        errors = [line for line in said if not line.startswith(("prepare:", "round "))]
        assert len(errors) == 1 and errors[0].startswith("error: fit: the loss is"), said
        assert str(run.round_folder(0) / "bad_batch.json") in errors[0]
    assert (
        run.pairs_file(0).exists()
        and not run.adapter_folder(0).exists()
        and len(run.state()["lambda"]) == 1
    )
