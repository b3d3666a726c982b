"""The peers' losses against enumeration, and GRPO's log-probabilities against the sampler's."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerControl, TrainerState

from benchmarks.bench_peers import row_of, world_of
from benchmarks.peers_grpo import DualAscent, PlainHeadTrainer
from benchmarks.peers_preferences import OFFSET, margin_pairs, offset_loss, safe_pairs
from benchmarks.peers_tables import best_in_hindsight, priced, print_tables, settled
from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.fit.losses import pair_loss
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.sampling.logprobs import response_logps

ANSWERS, BETA, LAMBDA = 5, 0.25, 0.7


def ids(numbers: list[int]) -> list[str]:
    return [f"y{number}" for number in numbers]


def test_without_an_offset_the_loss_is_dpos():
    log_ratio = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    plain = pair_loss(BETA * (log_ratio[:, 0] - log_ratio[:, 1]), torch.ones(6))
    torch.testing.assert_close(offset_loss(log_ratio, torch.zeros(6), BETA), plain)


def test_modpos_minimizer_is_the_maximizer_of_the_lagrangian():
    """All preferences of an enumerated world, each with its probability under the reward alone."""
    rng = np.random.default_rng(3)
    reward, utility = rng.normal(size=(2, ANSWERS))
    reference = np.log(rng.dirichlet(np.ones(ANSWERS)))
    problem = ConstrainedProblem("r", BETA, (Constraint("g", margin=0.1),))
    world = TabularWorld(problem, reference[None], reward[None], {"g": utility[None]})
    expected = world.maximizer(pd.Series({"g": LAMBDA}))[0]
    won, lost = zip(*itertools.permutations(range(ANSWERS), 2), strict=True)
    pairs = pd.DataFrame({"chosen_id": ids(won), "rejected_id": ids(lost)})
    weight = 1 / (1 + LAMBDA)
    rows = margin_pairs(pairs, pd.Series(utility, ids(range(ANSWERS))), weight * LAMBDA)
    offset = torch.tensor(rows[OFFSET].to_numpy())
    prob = torch.sigmoid(torch.tensor(reward[list(won)] - reward[list(lost)]))
    ratio = torch.zeros(ANSWERS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ratio], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        both = torch.stack([ratio[list(won)], ratio[list(lost)]], dim=1)
        value = (prob * offset_loss(both, offset, weight * BETA, weight)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    logp = torch.log_softmax(torch.tensor(reference) + ratio.detach(), dim=0)
    np.testing.assert_allclose(logp, expected, atol=1e-4)


def test_safedpo_turns_unsafe_winners_round_and_drops_unsafe_pairs():
    safe = pd.Series([True, True, False, False], ids(range(4)))
    pairs = pd.DataFrame({"chosen_id": ids([0, 0, 2, 2]), "rejected_id": ids([1, 2, 0, 3])})
    rows = safe_pairs(pairs, safe, delta=10.0)
    assert rows["chosen_id"].tolist() == ids([0, 0, 0])
    assert rows["rejected_id"].tolist() == ids([1, 2, 2])
    assert rows[OFFSET].tolist() == [0.0, 10.0, 10.0]


def test_dual_ascent_follows_the_batch_and_stays_nonnegative():
    ascent = DualAscent(lambda_=0.1, level=1.0, rate=0.2)
    for utility, expected in ((0.5, 0.2), (3.0, 0.0)):
        ascent.utility = utility
        ascent.on_step_end(None, TrainerState(global_step=0, max_steps=10), TrainerControl())
        assert ascent.lambda_ == pytest.approx(expected)


def test_grpos_log_probabilities_are_the_samplers(quickstart_policy):
    prompts, answers = [[5, 7, 10], [6, 8, 11]], [[14, 15, 0], [16, 17, 18]]
    inputs = torch.tensor([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        logps, _, _ = PlainHeadTrainer._get_per_token_logps_and_entropies(
            None, quickstart_policy.model, inputs, torch.ones_like(inputs), 3
        )
    expected = response_logps(quickstart_policy.model, prompts, answers, pad_id=0, batch_size=2)
    np.testing.assert_allclose(logps.sum(dim=1), expected, atol=1e-4)


def test_the_table_knows_when_u_settles_and_which_weight_was_best():
    rows = [{"steps": s, "u_over_b": u} for s, u in ((200, 0.01), (400, 0.2), (600, -0.05))]
    assert settled(rows) == 600
    assert settled(rows[:2]) is None
    records = [{"rows": [{"u_over_b": u, "closed": c}]} for u, c in ((-0.4, 1), (0, 0.8), (1, 0.5))]
    assert best_in_hindsight(records)["rows"][-1]["closed"] == 0.8


def test_the_price_of_u_is_the_exact_lagrangian():
    rng = np.random.default_rng(5)
    reward, utility = rng.normal(size=(2, 1, ANSWERS))
    utility -= reward  # or the constraint would be met for nothing
    reference = np.log(rng.dirichlet(np.ones(ANSWERS), size=1))
    problem = ConstrainedProblem("r", BETA, (Constraint("g", margin=0.3),))
    world = TabularWorld(problem, reference, reward, {"g": utility})
    best, logp = world.exact_optimum, np.log(rng.dirichlet(np.ones(ANSWERS), size=1))
    start, end = (world.lagrangian_gap(p, pd.Series(best.lambda_)) for p in (reference, logp))
    record = world_of(best)
    share = priced(record, row_of(0, best, world.evaluate(logp)))
    assert record["lambda_star"] > 0
    assert share == pytest.approx(1 - end / start, abs=1e-6)


def test_tables_keep_seeds_rates_and_scales_apart(capsys):
    def record(peer, seed, u, scale="std 1", **rate):
        task = {"peer": peer, "world": "embedded", "seed": seed, "scale": scale, "steps": 4}
        rows = [{"steps": 2, "closed": 0.5, "u_over_b": 1.0}]
        rows += [{"steps": 4, "closed": 1 - abs(u), "u_over_b": u}]
        made = {"sequences": 8, "sampled": 6, "seconds": 1.0, "reference_draws": 2}
        world = {"lambda_star": 1.0, "gap": 1.0, "margin": 1.0}
        return {"task": task | rate, "rows": rows} | made | world

    runs = [record("CAID", 0, 0.04), record("CAID", 1, -0.2), record("CAID", 0, 0.6, rate=1e-3)]
    print_tables([*runs, record("CAID", 0, 0.0, scale="std 10")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| CAID")]
    # runs, closed, at λ*'s price (1 − (|u| − u)/2), |u|, near, below, first step near
    assert rows[0][1:8] == ["2", "88, 80 %", "90, 80 %", "12, 20", "1", "1", "never"]
    assert rows[1][0] == "| CAID, rate 0.001" and rows[1][1:3] == ["1", "40, 40 %"]
    assert rows[2][1].startswith("100 % (+4), 80 % (**−20**)")
    assert rows[4][1:8] == ["1", "100, 100 %", "100, 100 %", "0, 0", "1", "0", "4"]
