"""The losses and the KL estimate against their definitions."""

import numpy as np
import pytest
import torch

from constrained_dpo.fit.losses import pair_loss
from constrained_dpo.fit.watch import kl_estimate


def test_pair_loss_is_the_expectation_of_the_drawn_loss():
    difference, target = torch.linspace(-3, 3, 7), torch.linspace(0, 1, 7)
    win, lose = pair_loss(difference, torch.ones(7)), pair_loss(-difference, torch.ones(7))
    torch.testing.assert_close(pair_loss(difference, target), target * win + (1 - target) * lose)
    torch.testing.assert_close(win, -torch.log(torch.sigmoid(difference)))


def test_soft_loss_is_minimal_where_the_log_ratio_is_the_score_difference():
    difference = torch.tensor([0.7], requires_grad=True)
    pair_loss(difference, torch.sigmoid(torch.tensor([0.7]))).sum().backward()
    assert difference.grad.abs().item() < 1e-7


def test_the_kl_estimate_is_of_the_policy_whatever_drew_the_responses():
    """Against the exact KL of two categorical laws; responses from a third, a tenth of them of
    unknown law."""
    rng = np.random.default_rng(1)
    policy, reference, law = (np.log(rng.dirichlet(np.full(6, 3.0))) for _ in range(3))
    exact = float(np.exp(policy) @ (policy - reference))
    drawn = rng.choice(6, size=200_000, p=np.exp(law))
    drawn_law = np.where(rng.random(len(drawn)) < 0.1, np.nan, law[drawn])
    estimate = kl_estimate(*map(torch.tensor, (policy[drawn], reference[drawn], drawn_law)))
    unweighted = float((policy - reference)[drawn].mean())
    assert estimate["kl"].item() == pytest.approx(exact, abs=0.01)
    assert abs(unweighted - exact) > 0.1
    assert 1 < estimate["kl_ess"].item() < 0.91 * len(drawn)
