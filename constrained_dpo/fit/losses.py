"""The losses whose minimizer over all policies is π*_λ ∝ π_ref exp(s_λ/β), whatever law drew the
responses. torch only.

ρ = log π_θ/π_ref of a response (nats); at the minimizer β ρ = s_λ − β log Z(x), so that differences
and softmaxes over one prompt's responses are known.
"""

import torch
import torch.nn.functional as F


def pair_loss(scaled_difference: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of σ(β(ρ_1 − ρ_2)) against the target probability; both of shape (num_pairs,),
    returns (num_pairs,).

    Source: CAID, arXiv:2505.19387, Lagrangian maximization by pseudo-preferences; with a soft
    target its expectation over the label.
    """
    return -(
        target * F.logsigmoid(scaled_difference) + (1 - target) * F.logsigmoid(-scaled_difference)
    )


def all_pairs_loss(
    log_ratio: torch.Tensor, score: torch.Tensor, beta: float | torch.Tensor
) -> torch.Tensor:
    """`pair_loss` with soft targets σ(s_i − s_j), averaged over the K(K−1)/2 pairs of a group;
    log_ratio (nats), score (score units): (num_groups, K), returns (num_groups,). beta: a number,
    or (num_groups, 1)."""
    first, second = torch.triu_indices(
        score.shape[1], score.shape[1], offset=1, device=score.device
    )
    target = torch.sigmoid(score[:, first] - score[:, second])
    return pair_loss(beta * (log_ratio[:, first] - log_ratio[:, second]), target).mean(dim=1)


def listwise_loss(
    log_ratio: torch.Tensor, score: torch.Tensor, beta: float | torch.Tensor
) -> torch.Tensor:
    """KL(softmax(s/β) ‖ softmax(ρ)) over a group: 0 at the minimizer; log_ratio, score:
    (num_groups, K), returns (num_groups,). beta: a number, or (num_groups, 1).

    Source: InfoNCA of Noise contrastive alignment of language models with explicit rewards,
    arXiv:2402.05369, less the entropy of the target, a constant. Unlike σ of a difference, the
    softmax keeps telling how much better the best response is where pairs saturate.
    """
    target = F.log_softmax(score / beta, dim=1)
    return F.kl_div(F.log_softmax(log_ratio, dim=1), target, reduction="none", log_target=True).sum(
        dim=1
    )
