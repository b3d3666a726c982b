"""Which round's policy is meant by best, best-dual or last, and when a run has converged. Reads
records of rounds; numpy/pandas only.

Nothing here looks at test prompts, so that the choice leaves the test's verdict as valid as for a
round chosen blindly.
"""

import numpy as np
import pandas as pd

from constrained_dpo.estimates.verdict import SATISFIED, VIOLATED, judge, overall, recorded_slack
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError

CHOICES = ("best", "best-dual", "last")


def satisfied_on_dual(record: dict, confidence: float) -> bool:
    """Whether every constraint is satisfied on the dual prompts, one-sided at the stated level."""
    return overall(judge(recorded_slack(record), confidence)) == SATISFIED


def violated_on_dual(record: dict, confidence: float) -> bool:
    """Whether some constraint is violated on the dual prompts: its estimate is below 0 beyond its
    error at the stated level."""
    return overall(judge(recorded_slack(record), confidence)) == VIOLATED


def best_round(records: list[dict], confidence: float) -> int:
    """The highest estimated objective E[r] − β KL among rounds satisfied on the dual prompts with
    confidence.

    Where the sampling law leaves no objective, the highest reward. Raises UserError when no round
    is satisfied.
    """
    satisfied = [r for r in records if satisfied_on_dual(r, confidence)]
    if not satisfied:
        raise UserError(
            f"--round best: no round of {len(records)} is satisfied on the dual prompts at "
            f"{100 * confidence:g} %; play more rounds, "
            "steer on the lower bound (dual.confidence_side: lower), or take --round last"
        )
    return max(satisfied, key=lambda r: r["reward"] if r["objective"] is None else r["objective"])[
        "round"
    ]


def best_dual_round(records: list[dict]) -> int:
    """argmin_t L(π_θt, λ_t), the smallest value of the dual function of the policies that the fit
    reaches: the best iterate of CAID's convergence result (arXiv:2505.19387, App. B.10). Raises
    UserError where the sampling law leaves no such value."""
    known = [r for r in records if r.get("lagrangian") is not None]
    if not known:
        raise UserError(
            "--round best-dual: no round has a dual value (round.json says why); take --round "
            "best or last"
        )
    return min(known, key=lambda r: r["lagrangian"])["round"]


def chosen_round(run: RunDirectory, choice: str) -> int:
    """The round that `--round K`, `best`, `best-dual` or `last` means; raises UserError where there
    is none."""
    played = run.rounds_done()
    if not played:
        raise UserError(
            f"{run.path}: no round has been played yet; `cdpo round {run.path}` plays one"
        )
    if choice == "last":
        return played - 1
    if choice in CHOICES:
        records = [run.round_record(t) for t in range(played)]
        return (
            best_round(records, run.recipe().dual.confidence)
            if choice == "best"
            else best_dual_round(records)
        )
    if not choice.isdigit() or int(choice) >= played:
        raise UserError(
            f"--round {choice}: give a round from 0 to {played - 1}, or {', '.join(CHOICES)}"
        )
    return int(choice)


def converged(
    record: dict,
    needed: pd.Series,
    unit: pd.Series,
    tolerance: float,
    target_gap: float | None,
    bound: float | None,
) -> bool:
    """Whether a round met the constraints with complementary slackness and its step left λ where it
    was.

    needed: by constraint, the rise of the utility over π_ref that is asked for (score units); unit:
    λ at which the utility weighs as much as the reward, std(r)/std(g). Met: v ≥ −tolerance · needed
    for the slack v that was steered on, and where λ > 0 also v ≤ tolerance · needed; |Δλ| ≤
    tolerance · max(λ, unit/10). With target_gap (score units of the reward) also bound − objective
    ≤ target_gap, bound being the smallest D so far; without a bound that is not met.
    """
    v, lam, after = (
        pd.Series(record[key], dtype=float) for key in ("steered_on", "lambda", "lambda_next")
    )
    room = tolerance * needed.reindex(v.index)
    met = (v >= -room) & ((v <= room) | (lam <= 0))
    still = (after - lam).abs() <= tolerance * np.maximum(lam, unit.reindex(v.index) / 10)
    if target_gap is not None and (bound is None or bound - record["objective"] > target_gap):
        return False
    return bool(met.all() and still.all())
