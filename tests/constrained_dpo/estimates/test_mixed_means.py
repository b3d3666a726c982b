"""E[g] from the policy's samples and π_ref's together: unbiased, and nearer than its own alone."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.estimates.mixed_means import mixed_means
from tests.helpers.tables import random_world


def drawn(world, law, policy, count, repeats, rng) -> pd.DataFrame:
    """Responses of every prompt `repeats` times over, as prompts of their own."""
    rows, count = [], count
    for row, logp in enumerate(law):
        chosen = rng.choice(len(logp), (repeats, count), p=np.exp(logp))
        rows.append(
            pd.DataFrame(
                {
                    "prompt_id": np.repeat([f"{row}-{i:04d}" for i in range(repeats)], count),
                    "g0": world.utilities["g0"][row, chosen].ravel(),
                    "policy_logp": policy[row, chosen].ravel(),
                    "ref_logp": world.ref_logp[row, chosen].ravel(),
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize(("lambda_", "most"), [(0.05, 0.75), (0.4, 0.95)])
def test_unbiased_and_less_spread(lambda_, most):
    world, rng = random_world(3, 1, prompts=4, responses=60), np.random.default_rng(0)
    policy = world.maximizer(pd.Series({"g0": lambda_}))
    if lambda_ < 0.1:  # near π_ref
        policy = np.logaddexp(policy + np.log(0.3), world.ref_logp + np.log(0.7))
    repeats = 2000
    samples = drawn(world, policy, policy, 6, repeats, rng)
    off_policy = drawn(world, world.ref_logp, policy, 12, repeats, rng)
    exact = (np.exp(policy) * world.utilities["g0"]).sum(axis=1)
    mixed = mixed_means(samples, off_policy, ["g0"])["g0"]
    alone = samples.groupby("prompt_id")["g0"].mean()
    variances = []
    for estimate in (mixed, alone):
        table = estimate.to_numpy().reshape(4, repeats)
        error = table.std(axis=1, ddof=1) / np.sqrt(repeats)
        assert (np.abs(table.mean(axis=1) - exact) < 4 * error + 0.004).all()
        variances.append((table.var(axis=1)).mean())
    assert variances[0] < most * variances[1]


def test_a_constant_is_estimated_without_noise():
    """Weights whose sum is not the count would show here."""
    world, rng = random_world(3, 1, prompts=3, responses=60), np.random.default_rng(0)
    world.utilities["g0"][:] = 2.0
    policy = world.maximizer(pd.Series({"g0": 0.4}))
    tables = [drawn(world, law, policy, 5, 1, rng) for law in (policy, world.ref_logp)]
    assert mixed_means(*tables, ["g0"])["g0"].to_numpy() == pytest.approx(2.0)


def test_the_same_policy_gives_the_mean_of_all():
    world, rng = random_world(3, 1, prompts=3, responses=60), np.random.default_rng(0)
    tables = [drawn(world, world.ref_logp, world.ref_logp, k, 1, rng) for k in (5, 7)]
    everything = pd.concat(tables).groupby("prompt_id")["g0"].mean()
    assert mixed_means(*tables, ["g0"])["g0"].to_numpy() == pytest.approx(everything.to_numpy())
