"""The certificate against enumeration: D, gaps, null rules, a planted missed mode."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.estimates.certificate import (
    Certificate,
    best_bound,
    certify,
    dual_estimates,
    missed_mass,
    off_policy_residual,
)
from constrained_dpo.estimates.certificate_words import sentence
from constrained_dpo.estimates.log_partition import log_mean_exp
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.tables import random_world


def draw(
    world: TabularWorld,
    logp: np.ndarray,
    count: int,
    rng: np.random.Generator,
    policy: np.ndarray | None = None,
) -> pd.DataFrame:
    """Scored responses drawn from `logp`, with the log-probabilities of `policy` (default: logp
    itself) and of π_ref."""
    policy = logp if policy is None else policy
    rows = np.repeat(np.arange(len(logp)), count)
    columns = np.concatenate(
        [rng.choice(logp.shape[1], count, p=np.exp(row) / np.exp(row).sum()) for row in logp]
    )
    frame = pd.DataFrame(
        {"prompt_id": [f"p{i:03d}" for i in rows], "r": world.reward[rows, columns]}
    )
    frame = frame.assign(**{n: g[rows, columns] for n, g in world.utilities.items()})
    laws = {"sample_logp": logp, "policy_logp": policy, "ref_logp": world.ref_logp}
    frame = frame.assign(**{name: table[rows, columns] for name, table in laws.items()})
    # one token decides in these worlds, so the KL of the only prefix is the KL itself
    path = (np.exp(logp) * (logp - world.ref_logp)).sum(axis=1)
    source = "reference" if logp is world.ref_logp else "policy"
    return frame.assign(path_kl=path[rows] if logp is policy else np.nan, source=source)


def mixture(world: TabularWorld, lambda_: pd.Series, share: float) -> np.ndarray:
    """log of a policy between π_ref and the maximizer at λ: an imperfect fit."""
    return np.logaddexp(
        world.maximizer(lambda_) + np.log(share), world.ref_logp + np.log(1 - share)
    )


def certificate(world, logp, lambda_, count, rng, others=None) -> Certificate:
    samples, reference = draw(world, logp, count, rng), draw(world, world.ref_logp, count, rng)
    off_policy = draw(world, world.ref_logp, count, rng, policy=logp)
    return certify(samples, reference, others or {}, off_policy, world.problem, lambda_)


@pytest.mark.parametrize("m", [0, 1, 2])
def test_dual_value_and_gaps_agree_with_enumeration(m):
    world = random_world(3, m, prompts=60, responses=40, beta=1.0)
    lambda_ = pd.Series([0.6, 0.3][:m], index=world.problem.names, dtype=float)
    logp = mixture(world, lambda_, 0.6)
    exact = world.evaluate(logp)
    lagrangian = exact.objective + sum(lambda_[n] * u for n, u in exact.u.items())
    gap = world.lagrangian_gap(logp, lambda_)
    record = certificate(world, logp, lambda_, 256, np.random.default_rng(0))
    assert gap > 0.03
    assert record.lagrangian_gap == pytest.approx(gap, abs=3 * record.lagrangian_gap_se)
    assert record.lagrangian == pytest.approx(lagrangian, abs=3 * record.lagrangian_se)
    assert record.dual_value == pytest.approx(lagrangian + gap, abs=3 * record.dual_value_se)
    assert record.dual_value >= world.optimum.dual_value - 3 * record.dual_value_se
    assert record.optimality_gap == pytest.approx(
        record.dual_value - exact.objective, abs=3 * record.optimality_gap_se
    )


def test_the_maximizer_has_no_gap_no_residual_and_full_response():
    world = random_world(4, 2, prompts=20, responses=30)
    lambda_ = pd.Series({"g0": 0.5, "g1": 0.1})
    record = certificate(world, world.maximizer(lambda_), lambda_, 32, np.random.default_rng(0))
    assert record.dual_values["policy"] - record.lagrangian == pytest.approx(0.0, abs=1e-9)
    assert record.residual == pytest.approx(0.0, abs=1e-9) and record.ess == pytest.approx(32)


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_the_residual_is_what_the_log_ratio_lacks(share):
    world = random_world(5, 1, prompts=20, responses=30)
    lambda_ = pd.Series({"g0": 0.4})
    score = world.reward + 0.4 * world.utilities["g0"]
    logp = world.ref_logp + share * score / world.problem.beta
    logp -= np.logaddexp.reduce(logp, axis=1, keepdims=True)
    samples = draw(world, logp, 16, np.random.default_rng(0))
    assert off_policy_residual(samples, world.problem, lambda_) == pytest.approx(
        (1 - share) * score.std(), rel=0.2
    )


def test_too_few_samples_or_too_heavy_weights_give_null_with_a_reason():
    world = random_world(6, 1, prompts=20, responses=50, beta=0.05)
    lambda_ = pd.Series({"g0": 0.5})
    far = certificate(world, world.ref_logp, lambda_, 16, np.random.default_rng(0))
    assert (
        far.lagrangian_gap is None
        and far.dual_value is None
        and "effective sample size" in far.certificate_reason
    )
    few = certificate(world, world.maximizer(lambda_), lambda_, 3, np.random.default_rng(0))
    assert (
        few.lagrangian_gap is None
        and "3 responses of a prompt are too few" in few.certificate_reason
    )
    assert "no estimate between them: 3 responses" in sentence([few], None, None, True)


def test_a_few_prompts_where_one_weight_is_all_are_not_averaged_away():
    """π_θ is the maximizer at four fifths of the prompts and π_ref at the rest: the mean effective
    sample size is high, and the jackknife would add tens of nats where one of the weights is nearly
    all of the sum."""
    world, lambda_ = (
        random_world(6, 1, prompts=60, responses=400, beta=0.02),
        pd.Series({"g0": 0.5}),
    )
    logp = world.maximizer(lambda_).copy()
    logp[::5] = world.ref_logp[::5]
    samples, reference = (
        draw(world, law, 64, np.random.default_rng(seed))
        for seed, law in enumerate((logp, world.ref_logp))
    )
    record = certify(samples, reference, {}, None, world.problem, lambda_)
    assert record.ess > 50 and record.lagrangian_gap is None
    assert "% of the prompts one response has about all of the weight" in record.certificate_reason

    estimates = dual_estimates(samples, {}, None, world.problem, lambda_)["policy"]
    weights = (
        (samples["r"] + 0.5 * samples["g0"]) / 0.02 + samples["ref_logp"] - samples["policy_logp"]
    )
    jackknife = 0.02 * log_mean_exp(weights, samples["prompt_id"])["jackknife"]
    dominated = estimates["ess"] < 2
    assert (
        6 < dominated.sum() < 13 and (jackknife - estimates["plain"])[dominated].max() > 0.1
    )  # score units, five nats
    assert (estimates["log_z"] == estimates["plain"])[dominated].all() and (
        estimates["log_z"] == jackknife
    )[~dominated].all()


def test_a_planted_missed_mode_fools_the_estimate_but_not_the_report():
    """π_θ is the maximizer but for a good answer of π_ref mass 0.1, to which it gives nothing: its
    own samples cannot show that."""
    rng = np.random.default_rng(0)
    world = random_world(7, 1, prompts=80, responses=40, beta=1.0)
    ref = (
        world.ref_logp
        - np.logaddexp.reduce(world.ref_logp[:, 1:], axis=1, keepdims=True)
        + np.log(0.9)
    )
    ref[:, 0] = np.log(0.1)
    reward = world.reward.copy()
    reward[:, 0] = 4.0
    world = TabularWorld(world.problem, ref, reward, world.utilities)
    lambda_ = pd.Series({"g0": 0.3})
    logp = world.maximizer(lambda_).copy()
    logp[:, 0] = -60.0
    logp -= np.logaddexp.reduce(logp, axis=1, keepdims=True)
    exact = world.lagrangian_gap(logp, lambda_)
    record = certificate(world, logp, lambda_, 32, rng)
    assert exact > 0.5
    assert (
        abs(record.dual_values["policy"] - record.lagrangian) < 0.02
    )  # the estimate from its own samples sees nothing
    assert record.lagrangian_gap + 2 * record.lagrangian_gap_se >= exact
    assert record.disagreement in ("reference", "mixture")
    words = sentence([record], world.evaluate(logp).objective, 0.0, True)
    assert "show mass that this policy's own samples miss" in words


@pytest.mark.parametrize("finds_the_best", [False, True])
def test_modes_that_rounds_miss_in_turn_give_null_although_no_mean_differs(finds_the_best):
    """Two good answers, which π_ref all but never draws; which is better depends on the prompt.
    Each round knows one of them: the means over prompts agree and all weights are even, and only
    prompt by prompt do the estimates show that either misses half."""
    rng, lambda_, rows = np.random.default_rng(0), pd.Series({"g0": 0.0}), np.arange(80)
    world = random_world(9, 1, prompts=80, responses=40, beta=0.05)
    ref, reward = world.ref_logp.copy(), world.reward.copy()
    ref[:, :2] = -15.0
    ref -= np.logaddexp.reduce(ref, axis=1, keepdims=True)
    reward[:, :2] = reward.max() + 3.0
    reward[rows, rows % 2] += 1.0
    world = TabularWorld(world.problem, ref, reward, world.utilities)

    def giving(answers: np.ndarray) -> np.ndarray:
        logp = np.full(ref.shape, -60.0)
        logp[rows, answers] = 0.0
        return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)

    now, before = (
        giving(rows % 2 if finds_the_best else np.zeros(80, int)),
        giving(np.ones(80, int)),
    )
    record = certificate(world, now, lambda_, 64, rng, {"round 0": draw(world, before, 64, rng)})
    assert record.ess > 63
    if finds_the_best:
        assert record.lagrangian_gap == pytest.approx(world.lagrangian_gap(now, lambda_), abs=0.01)
    else:
        assert (
            world.lagrangian_gap(now, lambda_) > 0.4
            and record.lagrangian_gap is record.dual_value is None
        )
        assert "show answers that these miss: at 50 % of the prompts" in record.certificate_reason


def test_chance_alone_does_not_look_like_missed_mass():
    """Ten sources that all see everything, with few and uneven weights: the largest of their
    estimates stays below what Jensen allows."""
    world, rng = random_world(10, 1, prompts=400, responses=40, beta=0.5), np.random.default_rng(0)
    lambda_ = pd.Series({"g0": 0.6})
    tables = {f"round {t}": draw(world, world.ref_logp, 8, rng) for t in range(9)}
    samples = draw(world, mixture(world, lambda_, 0.5), 8, rng)
    estimates = dual_estimates(samples, tables, None, world.problem, lambda_)
    missed, chance, _ = missed_mass(estimates, "policy", world.problem.beta)
    assert chance == pytest.approx(0.5 * np.log(10)) and 0.1 * chance < missed < chance


def test_an_earlier_rounds_samples_are_a_source_under_their_own_law():
    world, rng = random_world(8, 1, prompts=60, responses=40, beta=1.0), np.random.default_rng(0)
    lambda_ = pd.Series({"g0": 0.6})
    earlier = draw(world, mixture(world, pd.Series({"g0": 0.2}), 0.5), 128, rng)
    record = certificate(
        world, mixture(world, lambda_, 0.7), lambda_, 128, rng, {"round 0": earlier}
    )
    exact = world.evaluate(world.maximizer(lambda_))
    dual = exact.objective + 0.6 * exact.u["g0"]
    assert record.dual_values["round 0"] == pytest.approx(dual, abs=3 * record.dual_value_se)
    partial = certificate(
        world,
        mixture(world, lambda_, 0.7),
        lambda_,
        128,
        rng,
        {"round 0": earlier[earlier["prompt_id"] != "p000"]},
    )
    assert "round 0" not in partial.dual_values


def test_the_best_bound_and_what_is_said_of_it():
    gap = {"lagrangian_gap": 0.2, "lagrangian_gap_se": 0.01, "lagrangian_se": 0.03}
    records = [Certificate(dual_value=d, dual_value_se=0.04, **gap) for d in (1.5, 1.2, 1.4)]
    assert best_bound(records) is records[1]
    assert best_bound([Certificate()]) is None
    words = sentence(records, 1.0, 0.03, True)
    assert "0.200 ± 0.020 from the best policy" in words
    assert "more than 0.200 ± 0.100 higher (D of round 1" in words
    assert "compared with no bound" in sentence(records, 1.0, 0.03, False)
    paired = records[1].model_copy(update={"optimality_gap": 0.2, "optimality_gap_se": 0.01})
    assert "more than 0.200 ± 0.020 higher" in sentence([paired], 1.0, 0.03, True)


def test_threshold_constraints_enter_the_levels_absolutely():
    world = random_world(9, 1, prompts=40, responses=30, beta=1.0)
    problem = ConstrainedProblem("r", 1.0, (Constraint("g0", threshold=0.2),))
    world = TabularWorld(problem, world.ref_logp, world.reward, world.utilities)
    lambda_ = pd.Series({"g0": 0.5})
    exact = world.evaluate(world.maximizer(lambda_))
    record = certificate(world, world.maximizer(lambda_), lambda_, 128, np.random.default_rng(0))
    assert record.lagrangian == pytest.approx(
        exact.objective + 0.5 * exact.u["g0"], abs=3 * record.lagrangian_se
    )


@pytest.mark.slow
def test_the_intervals_ends_hold_where_there_is_no_estimate():
    """An effective sample size of 2 of 24 responses: no estimate, but D(λ) lies between the ends
    in all of 40 seeds."""
    world = random_world(6, 1, prompts=60, responses=60, beta=0.1)
    lambda_ = pd.Series({"g0": 0.5})
    logp = mixture(world, lambda_, 0.5)
    exact, gap = world.evaluate(logp), world.lagrangian_gap(logp, lambda_)
    dual = exact.objective + 0.5 * exact.u["g0"] + gap
    truth = {"dual_value": dual, "lagrangian_gap": gap, "optimality_gap": dual - exact.objective}
    nulls, covered = 0, dict.fromkeys(truth, 0)
    for seed in range(40):
        record = certificate(world, logp, lambda_, 6, np.random.default_rng(seed)).model_dump()
        nulls += record["dual_value"] is None
        for name, value in truth.items():
            low, high = record[f"{name}_low"], record[f"{name}_high"]
            covered[name] += low <= value <= (np.inf if high is None else high)
    assert nulls >= 20 and min(covered.values()) >= 37


def test_no_upper_end_is_given_where_a_source_has_one_response():
    world = random_world(6, 1, prompts=20, responses=60)
    lambda_ = pd.Series({"g0": 0.5})
    logp = mixture(world, lambda_, 0.5)
    record = certificate(world, logp, lambda_, 1, np.random.default_rng(0))
    assert record.dual_value_high is None and np.isfinite(record.dual_value_low)
    assert "without an upper end" in sentence([record], None, None, True)
