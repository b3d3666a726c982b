"""Groups: how they are drawn, their two losses, and a fit on them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from peft import load_peft_weights
from scipy import special

from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.losses import all_pairs_loss, listwise_loss, pair_loss
from constrained_dpo.fit.rows import group_dataset
from constrained_dpo.fit.trainer import FitPlan, build_trainer
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import replay
from data_prep.errors import UserError
from data_prep.labels.preferences import label_groups
from data_prep.sampling.logprobs import response_logps
from data_prep.tables import read_parquet, validate_groups
from tests.helpers.cli import cdpo
from tests.helpers.fits import LORA, fit_settings, make_pool, prompt_tokens
from tests.helpers.paths import QUICKSTART, RECIPES
from tests.helpers.tables import scored_frame

LAMBDA = pd.Series({"g": 0.7})


def grouped(frame, size=3, count=4, seed=0, round_number=0):
    return label_groups(
        frame,
        "r",
        LAMBDA,
        group_size=size,
        groups_per_prompt=count,
        seed=seed,
        round_number=round_number,
    )


def test_groups_use_every_response_before_any_comes_again():
    frame = scored_frame(0, 5, 11)
    groups = validate_groups(grouped(frame, size=3, count=7), "groups")
    assert (
        len(groups) == 5 * 7 * 3 and groups.groupby("prompt_id")["group_id"].nunique().eq(7).all()
    )
    assert (
        groups.groupby("group_id")["prompt_id"].nunique().eq(1).all()
        and not groups.duplicated(["group_id", "response_id"]).any()
    )
    number = groups["group_id"].str.rpartition("/")[2].astype(int)
    for first in (0, 3):  # 11 responses are 3 whole groups of 3 a pass
        one_pass = groups[(number >= first) & (number < first + 3)]
        assert not one_pass["response_id"].duplicated().any()
    owner = frame.set_index("response_id")["prompt_id"]
    assert (groups["response_id"].map(owner) == groups["prompt_id"]).all()
    score = frame.set_index("response_id").eval("r + 0.7 * g")
    np.testing.assert_allclose(groups["score"], groups["response_id"].map(score), rtol=1e-15)


def test_groups_depend_on_seed_and_round_but_not_on_the_order_of_rows():
    frame = scored_frame(1, 6, 8)
    pd.testing.assert_frame_equal(grouped(frame), grouped(frame.sample(frac=1, random_state=3)))
    assert not grouped(frame).equals(grouped(frame, seed=1)) and not grouped(frame).equals(
        grouped(frame, round_number=1)
    )


def test_prompts_with_too_few_responses_give_no_group():
    frame = pd.concat(
        [
            scored_frame(2, 1, 8),
            scored_frame(3, 1, 2).assign(prompt_id="few", response_id=["a", "b"]),
        ]
    )
    assert set(grouped(frame)["prompt_id"]) == {"p0"}
    with pytest.raises(UserError, match=r"no prompt has 9 responses.*fit\.group_size 9"):
        grouped(frame, size=9)
    with pytest.raises(UserError, match="groups differ in size"):
        validate_groups(grouped(frame).iloc[1:], "groups")


def test_all_pairs_of_two_is_the_pair_loss_and_of_more_its_mean():
    rng = torch.Generator().manual_seed(0)
    ratio, score = (torch.randn(5, 4, generator=rng) for _ in range(2))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    one = lambda i, j: pair_loss(
        0.3 * (ratio[:, i] - ratio[:, j]), torch.sigmoid(score[:, i] - score[:, j])
    )
    torch.testing.assert_close(
        all_pairs_loss(ratio, score, 0.3), sum(one(i, j) for i, j in pairs) / 6
    )
    torch.testing.assert_close(all_pairs_loss(ratio[:, :2], score[:, :2], 0.3), one(0, 1))


def test_listwise_is_the_divergence_of_the_softmaxes():
    rng = np.random.default_rng(0)
    ratio, score = rng.normal(size=(2, 6, 5))
    target, model = special.softmax(score / 0.3, axis=1), special.softmax(ratio, axis=1)
    exact = special.rel_entr(target, model).sum(axis=1)
    np.testing.assert_allclose(
        listwise_loss(torch.tensor(ratio), torch.tensor(score), 0.3), exact, rtol=1e-12
    )
    saturated = listwise_loss(torch.zeros(1, 3), torch.tensor([[5000.0, 0.0, -5000.0]]), 0.01)
    assert torch.isfinite(saturated).all()


@pytest.mark.parametrize("loss", [all_pairs_loss, listwise_loss])
def test_both_losses_are_least_at_the_maximizer_and_ignore_the_order(loss):
    rng = torch.Generator().manual_seed(1)
    score = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    at = (
        score / 0.25 + torch.randn(3, 1, generator=rng, dtype=torch.float64)
    ).requires_grad_()  # any log Z(x)
    least = loss(at, score, 0.25)
    least.sum().backward()
    assert at.grad.abs().max() < 1e-12
    for _ in range(5):
        other = at.detach() + torch.randn(3, 6, generator=rng, dtype=torch.float64)
        assert (loss(other, score, 0.25) > least).all()
        order = torch.randperm(6, generator=rng)
        torch.testing.assert_close(
            loss(other[:, order], score[:, order], 0.25), loss(other, score, 0.25)
        )


def test_relabel_writes_groups_from_the_shell(tmp_path):
    scored_frame(0, 5, 6).to_parquet(tmp_path / "scores.parquet")
    arguments = (
        "data",
        "relabel",
        tmp_path / "scores.parquet",
        "--reward",
        "r",
        "--lambda",
        "g=0.7",
        "--group-size",
        "3",
    )
    said = cdpo(
        *arguments, "--groups-per-prompt", "2", "--json", "-o", tmp_path / "groups.parquet", check=0
    ).stdout
    assert json.loads(said)["groups"] == 10
    pd.testing.assert_frame_equal(
        read_parquet(tmp_path / "groups.parquet"),
        grouped(read_parquet(tmp_path / "scores.parquet"), count=2),
    )
    assert (
        "groups hold scores"
        in cdpo(*arguments, "--text", "-o", tmp_path / "x.parquet", check=2).stderr
    )


def test_a_recipe_takes_soft_labels_alone_with_groups(tmp_path):
    error = cdpo(
        "init",
        QUICKSTART,
        tmp_path / "run",
        "-s",
        "fit.group_size=4",
        "-s",
        "fit.labels=argmax",
        check=2,
    ).stderr
    assert "fit.labels argmax is about pairs" in error


@pytest.mark.parametrize("name", ["quickstart", "quickstart_std10"])
def test_a_run_on_groups_from_relabel_to_dual_step(name, tmp_path):
    """The embedded world's recipes, smaller: `check` times such a fit, two rounds are played, the
    labels are groups.parquet, of the pool's recent responses most, and λ is replayed from the
    tables."""
    settings = [
        "fit.group_size=9",
        "fit.groups_per_prompt=4",
        "fit.steps=5",
        "fit.warmup_steps=0",
        "fit.batch_size=4",
        "dual.rounds=2",
    ]
    settings += [
        "sampling.responses_per_prompt=16",
        "dual.responses_per_prompt=16",
        "sampling.batch_size=64",
    ]
    settings += ["prompts.max_fit=8", "prompts.max_test=4"]
    overrides = [part for s in settings for part in ("-s", s)]
    recipe = RECIPES / f"{name}.yaml"
    assert (
        json.loads(cdpo("check", recipe, *overrides, "--json", check=0).stdout)["pilot"]["seconds"][
            "fit"
        ]
        > 0
    )
    cdpo("init", recipe, tmp_path / "run", *overrides, check=0)
    cdpo("run", tmp_path / "run", check=0)
    run = RunDirectory(tmp_path / "run")
    first, last = (read_parquet(run.groups_file(number)) for number in (0, 1))
    assert (
        first["group_id"].nunique() == last["group_id"].nunique() == 32
        and not run.pairs_file(0).exists()
    )
    assert set(first.groupby("group_id").size()) == {9}
    reference = set(read_parquet(run.pool_file(None))["response_id"])
    assert (
        first["response_id"].isin(reference).all()
        and 0 < last["response_id"].isin(reference).mean() < 0.5
    )
    assert replay(run) == run.state()["lambda"]
    assert any("lm_head" in name for name in load_peft_weights(str(run.adapter_folder(1))))


@pytest.fixture(scope="module")
def pool(quickstart_policy):
    return make_pool(quickstart_policy)


@pytest.fixture(scope="module")
def groups(pool):
    return label_groups(
        pool, "helpful", pd.Series({"harmless": 0.5}), group_size=4, groups_per_prompt=3, seed=0
    )


@pytest.mark.parametrize("kind", ["logistic", "listwise"])
def test_the_trainers_loss_is_that_of_the_responses_own_log_probabilities(
    quickstart_policy, pool, groups, kind, tmp_path
):
    policy, tokens = quickstart_policy, prompt_tokens(quickstart_policy)
    rows = group_dataset(groups, pool, tokens, 16)
    settings = fit_settings(group_size=4, loss=kind)
    trainer = build_trainer(
        policy, rows, FitPlan(settings, LORA, beta=0.3, seed=0, output=tmp_path)
    )
    try:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        trainer.model.eval()
        batch = trainer.data_collator([rows[i] for i in range(6)])
        loss = trainer.compute_loss(trainer.model, batch).item()
        prompts = [rows[i]["prompt_ids"] for i in range(6) for _ in range(4)]
        logps, _ = response_logps(
            trainer.model,
            prompts,
            [r for i in range(6) for r in rows[i]["responses_ids"]],
            pad_id=0,
            batch_size=7,
        )
        ratio = torch.tensor(logps).view(6, 4) - torch.tensor(
            rows[:6]["ref_logps"], dtype=torch.float64
        )
        score = torch.tensor(rows[:6]["scores"], dtype=torch.float64)
        expected = (
            (listwise_loss if kind == "listwise" else all_pairs_loss)(ratio, score, 0.3)
            .mean()
            .item()
        )
        assert loss == pytest.approx(expected, rel=1e-4) and ratio.abs().max() > 0.01
    finally:
        trainer.model.unload()


@pytest.mark.parametrize("kind", ["logistic", "listwise"])
def test_a_fit_on_groups_brings_log_ratios_to_the_scores(
    quickstart_policy, pool, groups, kind, tmp_path
):
    policy, tokens = quickstart_policy, prompt_tokens(quickstart_policy)
    settings = fit_settings(group_size=4, loss=kind, steps=60, batch_size=8, learning_rate=5e-3)
    fit_adapter(
        policy,
        groups,
        pool,
        tokens,
        FitPlan(settings, LORA, beta=0.5, seed=0, output=tmp_path / "adapter"),
    )
    from data_prep.models.adapters import attached_adapter

    with attached_adapter(policy, tmp_path / "adapter") as model:
        prompts = [tokens[pid] for pid in pool["prompt_id"]]
        logps, _ = response_logps(
            model, prompts, [ids.tolist() for ids in pool["token_ids"]], pad_id=0, batch_size=64
        )
    table = pd.DataFrame(
        {"prompt_id": pool["prompt_id"], "ratio": 0.5 * (logps - pool["ref_logp"])}
    )
    table["score"] = pool["helpful"] + 0.5 * pool["harmless"]
    centred = table[["ratio", "score"]] - table.groupby("prompt_id")[["ratio", "score"]].transform(
        "mean"
    )
    assert centred["ratio"].corr(centred["score"]) > 0.8
    rest = (centred["score"] - centred["ratio"]).std() / centred["score"].std()
    assert rest < 0.6


def test_a_group_that_names_an_unknown_response_is_refused(quickstart_policy, pool, groups):
    broken = groups.assign(response_id=groups["response_id"].where(groups.index != 2, "nobody"))
    with pytest.raises(
        UserError, match=r"groups: response_id 'nobody' is not in the pool \(1 rows\)"
    ):
        group_dataset(broken, pool, prompt_tokens(quickstart_policy), 16)
