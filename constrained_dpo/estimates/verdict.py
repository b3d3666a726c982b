"""Satisfied, violated or undecided: what the bounds of u allow to be said."""

import numpy as np
import pandas as pd

from constrained_dpo.estimates.intervals import spent_confidence

SATISFIED, VIOLATED, UNDECIDED = "satisfied", "violated", "undecided"

PLANNED_SHARE = 1 / 2
"""Of the error probability: kept for the round that the recipe ends with."""


def judge(u: pd.DataFrame) -> dict[str, str]:
    """Judge each constraint; the words hold for all of them together.

    u: `estimate_subgradient`. Satisfied where `each_low` is above 0, violated where `each_high` is
    below.
    """
    words = np.where(
        u["each_low"] > 0, SATISFIED, np.where(u["each_high"] < 0, VIOLATED, UNDECIDED)
    )
    return {str(name): str(word) for name, word in zip(u.index, words, strict=True)}


def overall(u: pd.DataFrame) -> str:
    """Judge all constraints in one word.

    u: `estimate_subgradient`. Satisfied where every one-sided bound `one_low` is above 0: the claim
    is wrong only where some u_i ≤ 0, and that constraint's own bound fails with at most its error
    probability (an intersection-union test; R. Berger, Technometrics 24, 1982), so no bound pays
    for the others. Violated where any constraint is, which does pay.
    """
    if (u["one_low"] > 0).all():
        return SATISFIED
    return VIOLATED if (u["each_high"] < 0).any() else UNDECIDED


def look_confidence(confidence: float, look: int, planned: int) -> float:
    """Give the confidence of the verdict at one round's look at the test prompts.

    look: 1, 2, ...; planned: the look that the recipe ends with. It keeps PLANNED_SHARE of the
    error probability; all other looks of the run share the rest by 6/(π² t²)
    (`intervals.spent_confidence`). So the verdicts of all rounds and of all points of a front,
    however many there are and in whatever order they come, hold at once with `confidence`: rounds
    before the planned one have t = look, and after it rounds and points of a front take turns.
    """
    if look == planned:
        return 1 - PLANNED_SHARE * (1 - confidence)
    return _rest(confidence, look if look < planned else 2 * look - planned - 2)


def front_confidence(confidence: float, look: int, planned: int) -> float:
    """Give the confidence of the verdict at one point of a run's fronts, as `look_confidence`.

    look: 1, 2, ... over all points of the run's fronts; planned: as there, a look of a round.
    """
    return _rest(confidence, planned - 1 + 2 * look)


def _rest(confidence: float, place: int) -> float:
    """The confidence at a place of the sequence that shares what the planned look leaves."""
    return spent_confidence(1 - (1 - PLANNED_SHARE) * (1 - confidence), place)
