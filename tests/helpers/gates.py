"""A gate's looks over given rooms, through the gate's own plan, bounds and verdicts: what the
simulations of its errors and of its samples play."""

from collections.abc import Sequence

import numpy as np

from constrained_dpo.estimates.intervals import Interval
from constrained_dpo.gate.decide import ends, overall, word
from constrained_dpo.gate.record import UNDECIDED
from constrained_dpo.gate.spending import look_errors, look_sizes, session_error


def played(
    rooms: Sequence[np.ndarray],
    bounds: Sequence[Interval | None],
    budgets: Sequence[int],
    until_decided: bool = True,
    confidence: float = 0.95,
) -> tuple[str, int]:
    """The gate's verdict and the prompts it took.

    rooms: of every check, by prompt; bounds: of a room, None: the range seen; budgets: of the first
    session and of each extension beyond it.
    """
    verdicts, done = [UNDECIDED] * len(rooms), 0
    for session, budget in enumerate(budgets, 1):
        sizes = look_sizes(done, budget) if until_decided else [budget]
        errors = look_errors(session_error(confidence, session), done, sizes)
        for size, error in zip(sizes, errors, strict=True):
            for check, (values, limits) in enumerate(zip(rooms, bounds, strict=True)):
                if verdicts[check] == UNDECIDED:
                    first = values[:size]
                    within = (first.min(), first.max()) if limits is None else limits
                    verdicts[check] = word(*ends(first, error, len(rooms), within))
            done = size
            if overall(verdicts) != UNDECIDED:
                return overall(verdicts), done
    return UNDECIDED, done
