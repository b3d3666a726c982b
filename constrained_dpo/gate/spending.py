"""How a gate shares its error probability over looks, and how many prompts it will need.

A *session* is a plan of looks up to a budget. Each of its looks spends the share of the session's
error that its new prompts are of the session's (alpha spending, linear in the prompts: K. Lan and
D. DeMets, Biometrika 70, 1983; by the union bound, so whatever the scores' law and whenever one
stops). The first session has 1 − RESERVE of the whole; every extension beyond its budget has a part
of the rest, RESERVE · 6/(π² k²), however many there are. Looks at sizes that grow by half decide
early where the room is large: benchmarks/bench_gate.py compares plans.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from constrained_dpo.estimates.intervals import spent_confidence

RESERVE = 0.2
"""Of the error probability: kept for extensions beyond the first budget."""

GROWTH = 1.5
"""From one look's size to the next."""

LOOKS = 6
"""Of a first session; the first look has an eighth of the budget."""

SMALLEST = 8
"""Prompts of a first look: fewer decide nothing."""

POWER = 0.8
"""Probability with which an expected size decides."""


def session_error(confidence: float, session: int) -> float:
    """Give the error probability of a session, 1, 2, ...; all together have 1 − confidence.

    Raises ValueError for a session below 1.
    """
    if session < 1:
        raise ValueError(f"sessions are counted from 1, not {session}")
    error = 1 - confidence
    if session == 1:
        return (1 - RESERVE) * error
    return 1 - spent_confidence(1 - RESERVE * error, session - 1)


def look_sizes(done: int, budget: int) -> list[int]:
    """List the sizes at which a session looks: growing by half up to the budget.

    done: prompts of earlier sessions. Raises ValueError where the budget is not above `done`.
    """
    if budget <= done:
        raise ValueError(f"a budget of {budget} prompts is not above {done}")
    sizes = [math.ceil(budget / GROWTH**k) for k in range(LOOKS)]
    least = max(done + 1, SMALLEST)
    return sorted({budget, *(size for size in sizes if size >= least)})


def look_errors(error: float, done: int, sizes: Sequence[int]) -> list[float]:
    """Share a session's error over its looks by their new prompts; the sum is `error`."""
    ends = np.array([done, *sizes], np.float64)
    shares = np.diff(ends) / (ends[-1] - ends[0])
    return [float(error * share) for share in shares]


def expected_size(
    room: float, std: float, sizes: Sequence[int], errors: Sequence[float]
) -> int | None:
    """Predict the size of the look that decides a check, with probability POWER; None where none
    does.

    room, std: of a prompt's room, its mean and standard deviation in the population; by the normal
    law. Which way it is decided follows from the sign of the room.
    """
    power = float(special.ndtri(POWER))
    for size, error in zip(sizes, errors, strict=True):
        if abs(room) * math.sqrt(size) >= (power - float(special.ndtri(error))) * std:
            return size
    return None
