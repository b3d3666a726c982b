"""Gradients and losses with gates: layouts and checkpointing change nothing, rows are apart, and β
is each row's own."""

import copy

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special

from constrained_dpo.fit.family import family_columns
from constrained_dpo.fit.losses import all_pairs_loss, listwise_loss, pair_loss
from constrained_dpo.fit.rows import group_dataset, pair_dataset
from data_prep.labels.groups import label_groups
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.preferences import label_pairs
from data_prep.sampling.logprobs import response_logps
from tests.helpers.fits import LORA, built_trainer, make_family, prompt_tokens, randomize

HEAD = LORA.model_copy(update={"target_modules": ["q_proj", "down_proj", "lm_head"]})
FAMILY = make_family("harmless", kappa=(0.5, 1.5))
BETA = 0.3
KINDS = {
    "pairs": {},
    "groups": {"group_size": 4},
    "listwise": {"group_size": 4, "loss": "listwise"},
}


def law(kappa: tuple[float, float] | None = (0.5, 1.5)) -> MultiplierRange:
    series = lambda value: pd.Series({"harmless": value})
    return MultiplierRange(series(0.5), series(0.05), 3.0, kappa)


def labels_of(pool: pd.DataFrame, kind: str, count: int = 3) -> pd.DataFrame:
    if kind == "pairs":
        return label_pairs(pool, "helpful", law(), labels="soft", pairs_per_prompt=count, seed=0)
    return label_groups(pool, "helpful", law(), group_size=4, groups_per_prompt=count, seed=0)


def rows_of(policy, pool: pd.DataFrame, kind: str) -> datasets.Dataset:
    """Twelve rows of four prompts, each under its own λ and κ."""
    make = pair_dataset if kind == "pairs" else group_dataset
    rows = make(labels_of(pool, kind), pool, prompt_tokens(policy), 16, FAMILY)
    return rows.select(range(0, len(rows), 2))


def gradients(trainer, rows) -> dict[str, torch.Tensor]:
    """Of the loss of these rows in one batch."""
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, trainer.data_collator(list(rows))).backward()
    trained = ((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    return {name: parameter.grad.clone() for name, parameter in trained}


def assert_same(ours, theirs, share: float) -> None:
    """Within a share of each tensor's largest entry."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=share * scale, rtol=0)


@pytest.mark.parametrize("lora", [LORA, HEAD], ids=["all-linear", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_checkpointing_leave_the_gradients_alone(
    plain_policy, pool, kind, lora, tmp_path
):
    """Also computed again in the backward pass, where the gates have to be those of the batch."""
    rows, found = rows_of(plain_policy, pool, kind), {}
    for shared in (False, True):
        for again in (False, True):
            settings = {"shared_prompts": shared, "gradient_checkpointing": again, **KINDS[kind]}
            policy = copy.deepcopy(plain_policy)
            with built_trainer(
                policy, rows, tmp_path, lora=lora, beta=BETA, family=FAMILY, **settings
            ) as trainer:
                assert (trainer.padded_because is None) == shared, trainer.padded_because
                randomize(trainer, 0.1)
                if again:
                    reentrant = {"use_reentrant": False}
                    trainer.model.gradient_checkpointing_enable(reentrant)
                trainer.model.train()
                assert trainer.model.is_gradient_checkpointing == again
                found[shared, again] = gradients(trainer, rows)
    assert max(value.abs().max() for value in found[False, False].values()) > 1e-3
    for key in ((False, True), (True, False), (True, True)):
        assert_same(found[key], found[False, False], 1e-4 if key[0] else 1e-6)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
@pytest.mark.parametrize("kind", ["pairs", "listwise"])
def test_a_row_s_gates_are_its_own(plain_policy, pool, kind, shared, tmp_path):
    """The gradient of a batch is the mean of its rows' alone; another row's gates do not enter."""
    rows = rows_of(plain_policy, pool, kind).select(range(4))
    settings = {"shared_prompts": shared, **KINDS[kind]}
    with built_trainer(
        copy.deepcopy(plain_policy), rows, tmp_path, beta=BETA, family=FAMILY, lora=HEAD, **settings
    ) as trainer:
        randomize(trainer, 0.1)
        together = gradients(trainer, rows)
        alone = [gradients(trainer, [row]) for row in rows]
        others = [dict(row) for row in rows]
        others[1] |= {"gates": [0.2, 3.0]}
        changed, its = gradients(trainer, others), gradients(trainer, [others[1]])
    mean = {name: torch.stack([g[name] for g in alone]).mean(dim=0) for name in together}
    assert_same(together, mean, 1e-5)
    moved = {name: changed[name] - together[name] for name in together}
    by_itself = {name: (its[name] - alone[1][name]) / len(rows) for name in together}
    assert max(value.abs().max() for value in moved.values()) > 1e-4
    assert_same(moved, by_itself, 1e-3)


def test_a_gradient_is_the_difference_quotient(plain_policy, pool, tmp_path):
    """Along a random direction of the weights, κ and λ of every row different."""
    rows = rows_of(plain_policy, pool, "groups")
    with built_trainer(
        copy.deepcopy(plain_policy), rows, tmp_path, family=FAMILY, lora=HEAD, group_size=4
    ) as trainer:
        randomize(trainer, 0.1)
        model = trainer.model.double()
        slope, step = gradients(trainer, rows), 1e-3
        generator, losses = torch.Generator().manual_seed(0), []
        direction = {n: torch.randn(g.shape, generator=generator) for n, g in slope.items()}
        with torch.no_grad():
            for sign in (step, -2 * step):
                for name, parameter in model.named_parameters():
                    if name in direction:
                        parameter += sign * direction[name]
                batch = trainer.data_collator(list(rows))
                losses.append(trainer.compute_loss(model, batch).item())
    along = sum(float((slope[name] * direction[name]).sum()) for name in slope)
    assert along == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula_with_each_rows_beta(plain_policy, pool, kind, tmp_path):
    """Log-ratios of the gated model; scores r + λ·g and targets from the pool and the labels'
    multipliers; β/κ; numpy."""
    rows = rows_of(plain_policy, pool, kind)
    with built_trainer(
        copy.deepcopy(plain_policy), rows, tmp_path, beta=BETA, family=FAMILY, **KINDS[kind]
    ) as trainer:
        randomize(trainer, 0.1)
        trainer.model.eval()
        with torch.no_grad():
            batch = trainer.data_collator(list(rows))
            loss, ratio = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    ratio = ratio.double().numpy()
    labels = labels_of(pool, kind)
    if kind != "pairs":
        labels = labels.sort_values("group_id", kind="stable").iloc[::4]
    labels = labels.iloc[::2]
    lambda_, kappa = family_columns(labels, ["harmless"])["harmless"], labels["kappa"].to_numpy()
    np.testing.assert_allclose(rows["kappa"], kappa, rtol=1e-6)
    gates = np.stack([kappa, kappa * lambda_ / FAMILY.units["harmless"]], axis=1)
    np.testing.assert_allclose(rows["gates"], gates, rtol=1e-5)
    scores = pool.set_index("response_id")
    names = np.array(
        [[row["chosen_id"], row["rejected_id"]] for row in rows]
        if kind == "pairs"
        else rows["response_id"]
    )
    helpful, harmless = (scores[n].loc[names.ravel()].to_numpy() for n in ("helpful", "harmless"))
    score = (helpful + np.repeat(lambda_, names.shape[1]).to_numpy() * harmless).reshape(
        names.shape
    )
    own_beta = (BETA / kappa)[:, None]
    if kind == "listwise":
        target, model = special.softmax(score / own_beta, axis=1), special.softmax(ratio, axis=1)
        expected = special.rel_entr(target, model).sum(axis=1)
    else:
        i, j = np.triu_indices(names.shape[1], 1)
        target = special.expit(score[:, i] - score[:, j])
        log_odds = own_beta * (ratio[:, i] - ratio[:, j])
        entropy = target * special.log_expit(log_odds) + (1 - target) * special.log_expit(-log_odds)
        expected = -entropy.mean(axis=1)
    weight = np.array(rows["weight"]) if kind == "pairs" else 1.0
    assert loss.item() == pytest.approx(float(np.mean(weight * expected)), rel=1e-4)
    assert np.ptp(kappa) > 0.3 and np.abs(ratio).max() > 0.1


@pytest.mark.parametrize("kind", ["all pairs", "listwise", "pair"])
def test_the_minimizer_is_the_tilted_reference_at_each_rows_kappa(kind):
    """Over all policies of an enumerable toy: π_ref exp(κ (r + λ g)/β)/Z, row by row."""
    rng = np.random.default_rng(0)
    reference = special.log_softmax(rng.normal(size=(5, 6)), axis=1)
    r, g = rng.normal(size=(2, 5, 6))
    lambda_, kappa = rng.uniform(0, 2, (5, 1)), rng.uniform(0.5, 1.5, (5, 1))
    score, own_beta = torch.tensor(r + lambda_ * g), torch.tensor(BETA / kappa)
    logits = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )
    i, j = torch.triu_indices(6, 6, offset=1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(dim=1) - torch.tensor(reference)
        if kind == "pair":
            target = torch.sigmoid(score[:, i] - score[:, j])
            value = pair_loss(own_beta * (ratio[:, i] - ratio[:, j]), target).mean()
        else:
            of = listwise_loss if kind == "listwise" else all_pairs_loss
            value = of(ratio, score, own_beta).mean()
        value.backward()
        return value

    optimizer.step(loss)
    exact = special.softmax(reference + kappa * (r + lambda_ * g) / BETA, axis=1)
    policy = logits.detach().softmax(dim=1).numpy()
    np.testing.assert_allclose(policy, exact, atol=1e-4)
    assert np.abs(exact - special.softmax(reference + (r + lambda_ * g) / BETA, axis=1)).max() > 0.1


def test_rows_without_kappa_have_the_recipes_beta(plain_policy, pool, tmp_path):
    groups = label_groups(pool, "helpful", law(None), group_size=4, groups_per_prompt=2, seed=0)
    assert "kappa" not in groups
    rows = group_dataset(groups, pool, prompt_tokens(plain_policy), 16, make_family())
    assert set(rows["kappa"]) == {1.0} and {gates[0] for gates in rows["gates"]} == {1.0}
    plain = group_dataset(groups, pool, prompt_tokens(plain_policy), 16)
    assert "gates" not in plain.column_names and "kappa" not in plain.column_names


def test_log_probabilities_without_gates_are_those_of_plain_lora(plain_policy, pool, tmp_path):
    """Outside the loss, as in the check of the anchor, the gated model is an ordinary LoRA."""
    rows = rows_of(plain_policy, pool, "pairs")
    with built_trainer(
        copy.deepcopy(plain_policy), rows, tmp_path, family=FAMILY, batch_size=4
    ) as trainer:
        texts = list(rows["prompt_ids"]), [pair[0] for pair in rows["responses_ids"]]
        logps = response_logps(trainer.model, *texts, pad_id=0, batch_size=5)
    reference = [pair[0] for pair in rows["ref_logps"]]
    np.testing.assert_allclose(logps, reference, atol=1e-4)
