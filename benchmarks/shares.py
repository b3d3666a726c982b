"""What the tables call "gap closed"."""

from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy


def share_closed(optimum: ExactOptimum, policy: ExactPolicy) -> float:
    """Share of the gap from π_ref's objective to P* that a policy closes; NaN where there is no
    gap."""
    share = optimum.share_closed(policy)
    return float("nan") if share is None else share
