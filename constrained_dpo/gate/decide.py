"""Passed, failed or undecided: what the looks of a gate allow to be said. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import special

from constrained_dpo.estimates.intervals import Interval, mean_interval
from constrained_dpo.gate.capability import Capability
from constrained_dpo.gate.claims import Claim
from constrained_dpo.gate.record import FAILED, PASSED, UNDECIDED, CheckResult
from constrained_dpo.monte_carlo import standard_error


def overall(verdicts: Sequence[str]) -> str:
    """Judge the whole gate: passed where every check is, failed where one is.

    A gate that should not pass has a check whose claim is false, and it passes only where that
    check does, which has probability 1 − confidence at most over all its looks: an
    intersection-union test, in which no check pays for the others (R. Berger, Technometrics 24,
    1982). One failed check fails the gate, so failing pays: each check has a share of the error
    probability by the number of checks (Bonferroni).
    """
    if FAILED in verdicts:
        return FAILED
    return PASSED if verdicts and all(word == PASSED for word in verdicts) else UNDECIDED


def ends(values: np.ndarray, error: float, checks: int, bounds: Interval) -> Interval:
    """Bound a check's mean room at one look: below at `error`, above at `error` / checks.

    values: (num_prompts,) rooms; bounds: of a prompt's room. Source: `intervals.mean_interval`.
    """
    low = mean_interval(values, 1 - 2 * error, bounds)[0]
    return low, mean_interval(values, 1 - 2 * error / checks, bounds)[1]


def word(low: float, high: float) -> str:
    """Judge one check by its bounds; passed comes first where they contradict each other."""
    return PASSED if low > 0 else FAILED if high < 0 else UNDECIDED


def judge_claim(
    claim: Claim,
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    error: float,
    checks: int,
    earlier: CheckResult | None = None,
    seen: Sequence[pd.Series] = (),
) -> CheckResult:
    """Judge a claim at one look.

    samples, reference: all responses so far; error: what this look spends; checks: of the whole
    gate; earlier: the result of the look before, whose bounds stay true; seen: further rooms, for a
    score whose range is not known.
    """
    rooms = claim.room(samples, reference)
    bounds = claim.bounds([rooms, claim.reference_room(reference), *seen])
    low, high = ends(rooms.to_numpy(np.float64), error, checks, bounds)
    if claim.measure.moves:  # at the samples' quantile the room is not below the tail's own
        moved = claim.at_tail_of(samples)
        upper = moved.room(samples, reference)
        around = moved.bounds([rooms, upper, claim.reference_room(reference), *seen])
        high = ends(upper.to_numpy(np.float64), error, checks, around)[1]
    low, high = _sharper(low, high, earlier)
    return CheckResult(
        kind=claim.kind,
        name=claim.name,
        claim=claim.words,
        verdict=word(low, high),
        room=float(rooms.mean()),
        se=standard_error(rooms),
        low=_finite(low),
        high=_finite(high),
        policy=float(claim.means(samples).mean()),
        reference=float(claim.reference_means(reference).mean()),
        prompts=claim.prompts,
        num_prompts=len(rooms),
        decided_at=None if word(low, high) == UNDECIDED else len(rooms),
        bounded=claim.bounded,
    )


def _sharper(low: float, high: float, earlier: CheckResult | None) -> Interval:
    """Intersect with the bounds of earlier looks: all of them hold at once."""
    if earlier is None:
        return low, high
    return (
        low if earlier.low is None else max(low, earlier.low),
        high if earlier.high is None else min(high, earlier.high),
    )


def _finite(end: float) -> float | None:
    return float(end) if np.isfinite(end) else None


def judge_capability(capability: Capability, error: float, checks: int) -> CheckResult:
    """Judge another tool's results, by the normal law; they do not grow, so one look has it all.

    error: the gate's whole error probability. Both results count as independent. Over the same
    items they rise and fall together, so the interval is rather too wide.
    """
    below, above = (float(-special.ndtri(share)) for share in (error, error / checks))
    room, se = capability.room, capability.se
    low, high = room - below * se, room + above * se
    return CheckResult(
        kind="capability",
        name=capability.name,
        claim=capability.words,
        verdict=word(low, high),
        room=room,
        se=se,
        low=low,
        high=high,
        policy=capability.after,
        reference=capability.before,
        prompts=None,
        num_prompts=None,
        decided_at=None,
        bounded=True,
    )


def open_sets(claims: Sequence[Claim], results: Mapping[str, CheckResult]) -> list[str]:
    """Name the sets of prompts on which a claim is not decided yet, by the results' titles."""
    undecided = (
        claim.prompts
        for claim in claims
        if claim.title not in results or results[claim.title].verdict == UNDECIDED
    )
    return list(dict.fromkeys(undecided))
