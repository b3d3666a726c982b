"""A certificate in one sentence."""

from collections.abc import Sequence

import numpy as np

from constrained_dpo.estimates.certificate import Certificate, best_bound


def sentence(
    rounds: Sequence[Certificate],
    objective: float | None,
    objective_se: float | None,
    meets_constraints: bool,
) -> str:
    """Say what the last round's certificate bounds, and when the bound is loose.

    rounds: all up to that one; objective, objective_se: of its policy.
    """
    last, best = rounds[-1], best_bound(rounds)
    if last.dual_value is None or best is None:
        return _interval_sentence(last)
    gap, error = last.lagrangian_gap or 0.0, last.lagrangian_gap_se or 0.0
    text = f"the fit is {gap:.3f} ± {2 * error:.3f} from the best policy at this λ"
    if meets_constraints:
        most = (best.dual_value or 0.0) - (objective or 0.0)
        apart = float(np.hypot(best.dual_value_se or 0.0, objective_se or 0.0))
        # of the same round the difference was paired by prompt
        paired = last.optimality_gap_se if best is last else None
        spread = 2 * (apart if paired is None else paired)
        number = [c is best for c in rounds].index(True)
        text += (
            "; no policy that meets the constraints has an objective more than "
            f"{max(most, 0.0):.3f} ± {spread:.3f} higher (D of round {number}; loose where λ is "
            "far from optimal)"
        )
    else:
        text += "; the constraints are not met, so its objective is compared with no bound"
    if last.disagreement:
        text += f"; samples of {last.disagreement} show mass that this policy's own samples miss"
    return text


def _interval_sentence(certificate: Certificate) -> str:
    """What can be said where the samples carry no estimate of the gap."""
    low, high = certificate.lagrangian_gap_low, certificate.lagrangian_gap_high
    if low is None:
        return f"no certificate: {certificate.certificate_reason}"
    most = "without an upper end" if high is None else f"at most {high:.3g}"
    return (
        f"the fit is at least {max(low, 0.0):.3g} from the best policy at this λ, {most}; no "
        f"estimate between them: {certificate.certificate_reason}"
    )
