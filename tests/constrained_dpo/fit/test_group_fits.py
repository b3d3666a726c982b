"""Groups in a fit: their two losses, what the trainer computes, where a fit ends, and a run on
them."""

import numpy as np
import pandas as pd
import pytest
import torch
from peft import load_peft_weights
from scipy import special

from constrained_dpo.api import Run
from constrained_dpo.check.check import check_recipe
from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.losses import all_pairs_loss, listwise_loss, pair_loss
from constrained_dpo.fit.rows import group_dataset
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.record import replay
from data_prep.errors import UserError
from data_prep.labels.groups import label_groups
from data_prep.models.adapters import attached_adapter
from data_prep.readers.tables import read_parquet
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import LORA, built_trainer, fit_settings, prompt_tokens
from tests.helpers.paths import QUICKSTART, RECIPES


def test_all_pairs_of_two_is_the_pair_loss_and_of_more_its_mean():
    rng = torch.Generator().manual_seed(0)
    ratio, score = (torch.randn(5, 4, generator=rng) for _ in range(2))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    one = lambda i, j: pair_loss(
        0.3 * (ratio[:, i] - ratio[:, j]), torch.sigmoid(score[:, i] - score[:, j])
    )
    mean = sum(one(i, j) for i, j in pairs) / 6
    torch.testing.assert_close(all_pairs_loss(ratio, score, 0.3), mean)
    torch.testing.assert_close(all_pairs_loss(ratio[:, :2], score[:, :2], 0.3), one(0, 1))


def test_listwise_is_the_divergence_of_the_softmaxes():
    ratio, score = np.random.default_rng(0).normal(size=(2, 6, 5))
    target, model = special.softmax(score / 0.3, axis=1), special.softmax(ratio, axis=1)
    exact = special.rel_entr(target, model).sum(axis=1)
    loss = listwise_loss(torch.tensor(ratio), torch.tensor(score), 0.3)
    np.testing.assert_allclose(loss, exact, rtol=1e-12)
    saturated = listwise_loss(torch.zeros(1, 3), torch.tensor([[5000.0, 0.0, -5000.0]]), 0.01)
    assert torch.isfinite(saturated).all()


@pytest.mark.parametrize("loss", [all_pairs_loss, listwise_loss])
def test_both_losses_are_least_at_the_maximizer_and_ignore_the_order(loss):
    rng = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    score = normal(3, 6)
    at = (score / 0.25 + normal(3, 1)).requires_grad_()  # any log Z(x)
    least = loss(at, score, 0.25)
    least.sum().backward()
    assert at.grad.abs().max() < 1e-12
    for _ in range(5):
        other, order = at.detach() + normal(3, 6), torch.randperm(6, generator=rng)
        value = loss(other, score, 0.25)
        assert (value > least).all()
        torch.testing.assert_close(loss(other[:, order], score[:, order], 0.25), value)


@pytest.fixture(scope="module")
def groups(pool):
    lambda_ = pd.Series({"harmless": 0.5})
    return label_groups(pool, "helpful", lambda_, group_size=4, groups_per_prompt=3, seed=0)


@pytest.mark.parametrize("kind", ["logistic", "listwise"])
def test_the_trainers_loss_is_that_of_the_responses_own_log_probabilities(
    plain_policy, pool, groups, kind, tmp_path
):
    rows = group_dataset(groups, pool, prompt_tokens(plain_policy), 16)
    settings = {"group_size": 4, "loss": kind}
    with built_trainer(plain_policy, rows, tmp_path, beta=0.3, **settings) as trainer:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        trainer.model.eval()
        batch = trainer.data_collator([rows[i] for i in range(6)])
        loss = trainer.compute_loss(trainer.model, batch).item()
        logps = response_logps(
            trainer.model,
            [rows[i]["prompt_ids"] for i in range(6) for _ in range(4)],
            [response for i in range(6) for response in rows[i]["responses_ids"]],
            pad_id=0,
            batch_size=7,
        )
    stored = torch.tensor(rows[:6]["ref_logps"], dtype=torch.float64)
    ratio = torch.tensor(logps).view(6, 4) - stored
    score = torch.tensor(rows[:6]["scores"], dtype=torch.float64)
    by_row = (listwise_loss if kind == "listwise" else all_pairs_loss)(ratio, score, 0.3)
    assert loss == pytest.approx(by_row.mean().item(), rel=1e-4)
    assert ratio.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["logistic", "listwise"])
def test_a_fit_on_groups_brings_log_ratios_to_the_scores(
    plain_policy, pool, groups, kind, tmp_path
):
    policy, tokens, output = plain_policy, prompt_tokens(plain_policy), tmp_path / "adapter"
    settings = fit_settings(group_size=4, loss=kind, steps=30, batch_size=8, learning_rate=1e-2)
    plan = FitPlan(settings, LORA, beta=0.5, seed=0, output=output)
    fit_adapter(policy, groups, pool, tokens, plan)
    prompts = [tokens[pid] for pid in pool["prompt_id"]]
    responses = [ids.tolist() for ids in pool["token_ids"]]
    with attached_adapter(policy, output) as model:
        logps = response_logps(model, prompts, responses, pad_id=0, batch_size=96)
    table = pd.DataFrame({"ratio": 0.5 * (logps - pool["ref_logp"])})
    table["score"] = pool["helpful"] + 0.5 * pool["harmless"]
    centred = table - table.groupby(pool["prompt_id"]).transform("mean")
    assert centred["ratio"].corr(centred["score"]) > 0.8
    assert (centred["score"] - centred["ratio"]).std() < 0.6 * centred["score"].std()


def test_a_group_that_names_an_unknown_response_is_refused(plain_policy, pool, groups):
    broken = groups.assign(response_id=groups["response_id"].where(groups.index != 2, "nobody"))
    with pytest.raises(UserError, match=r"groups: response_id 'nobody' is not in the pool \(1 row"):
        group_dataset(broken, pool, prompt_tokens(plain_policy), 16)


def test_a_recipe_takes_soft_labels_alone_with_groups():
    with pytest.raises(UserError, match=r"fit\.labels argmax is about pairs"):
        load_recipe(QUICKSTART, ["fit.group_size=4", "fit.labels=argmax"])


# A run of the embedded world's recipes, smaller: their scores, losses and adapted modules.
TINY = (
    "policy.quantization=none",
    "prompts.max_fit=2",
    "prompts.max_test=2",
    "sampling.responses_per_prompt=16",
    "sampling.batch_size=64",
    "dual.responses_per_prompt=16",
    "dual.rounds=2",
    "fit.group_size=9",
    "fit.refresh=1",
    "fit.groups_per_prompt=4",
    "fit.steps=4",
    "fit.warmup_steps=0",
    "fit.batch_size=2",
)
STD10 = pytest.param("quickstart_two_constraints", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["quickstart_caid", STD10])
def played(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("groups") / "run"
    run = Run.create(RECIPES / f"{request.param}.yaml", path, list(TINY))
    run.play()
    return run.directory


def test_a_round_on_groups_writes_groups_and_no_pairs(played):
    for number in (0, 1):
        groups = read_parquet(played.groups_file(number))
        assert groups.groupby("group_id").size().tolist() == [9] * 8
        assert not played.pairs_file(number).exists()


def test_groups_of_a_later_round_are_of_recent_responses_most(played):
    first, last = (read_parquet(played.groups_file(number))["response_id"] for number in (0, 1))
    reference = set(read_parquet(played.pool_file(None))["response_id"])
    assert first.isin(reference).all()
    assert 0 < last.isin(reference).mean() < 0.5


def test_a_run_on_groups_is_replayed_from_its_tables(played):
    assert replay(played) == played.state().lambda_


def test_the_recipes_adapter_is_on_the_language_model_head_too(played):
    weights = load_peft_weights(str(played.adapter_folder(1)))
    assert any("lm_head" in name for name in weights)


def test_a_check_times_a_fit_on_groups():
    report = check_recipe(load_recipe(RECIPES / "quickstart.yaml", TINY), pilot=True, target_se={})
    assert report.pilot.seconds["fit"] > 0
