"""`cdpo gate`: false passes, passes, and prompts used; markdown tables on stdout.

    python -m benchmarks.bench_gate [--repetitions 1000]

One of five checks has the room that the row says, the others far more. Rooms are in standard errors
of the planned size (100 prompts). fixed: one look at 100 prompts; until decided: looks up to 400
prompts; extended: a first budget of 100 prompts, and the budget raised up to ten times, by 40
prompts each, until the gate is decided. Laws of a prompt's room: normal (range unknown), the
difference of two indicators (range known), an indicator of which 10 % fail at a room of 0.
"""

import argparse
from collections.abc import Callable

import numpy as np

from constrained_dpo.gate.record import FAILED, PASSED
from tests.helpers.gates import played

PLANNED = 100
PLANS = {
    "fixed": ([PLANNED], False),
    "until decided": ([4 * PLANNED], True),
    "extended": ([PLANNED + 40 * k for k in range(11)], True),
}

Law = Callable[[np.random.Generator, float, int], np.ndarray]


def normal(rng: np.random.Generator, errors: float, count: int) -> np.ndarray:
    return rng.normal(errors / np.sqrt(PLANNED), 1.0, count)


def two_indicators(rng: np.random.Generator, errors: float, count: int) -> np.ndarray:
    """Means of 4 indicators each, at 0.3 and a little above; the std of a room is 0.32."""
    after = 0.3 + errors * 0.324 / np.sqrt(PLANNED)
    return rng.binomial(4, after, count) / 4 - rng.binomial(4, 0.3, count) / 4


def rare_failure(rng: np.random.Generator, errors: float, count: int) -> np.ndarray:
    """An indicator that must hold at 90 % of prompts; std 0.3."""
    return (rng.random(count) < 0.9 + errors * 0.3 / np.sqrt(PLANNED)) - 0.9


LAWS: dict[str, tuple[Law, tuple[float, float] | None]] = {
    "normal": (normal, None),
    "two indicators": (two_indicators, (-1.0, 1.0)),
    "rare failure": (rare_failure, (-0.9, 0.1)),
}


def row(law: str, plan: str, errors: float, repetitions: int) -> None:
    draw, bounds = LAWS[law]
    budgets, until_decided = PLANS[plan]
    passed, failed, sizes = 0, 0, []
    for repetition in range(repetitions):
        rng = np.random.default_rng([repetition, round(10 * errors) + 100])
        rooms = draw(rng, errors, budgets[-1])
        # The other four hold by far: an indicator without a failure passes at the first look.
        others = [np.full(budgets[-1], 0.9)] * 4
        verdict, size = played(
            [rooms, *others], [bounds, *[(0.5, 1.0)] * 4], budgets, until_decided
        )
        passed, failed = passed + (verdict == PASSED), failed + (verdict == FAILED)
        sizes.append(size)
    cells = (law, plan, f"{errors:+g}", f"{100 * passed / repetitions:.1f} %")
    more = (f"{100 * failed / repetitions:.1f} %", f"{np.mean(sizes):.0f}")
    print("| " + " | ".join([*cells, *more]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--law", choices=list(LAWS), action="append")
    arguments = parser.parse_args()
    print("| law | plan | room, SE at 100 prompts | passed | failed | mean prompts |")
    print("|---|---|---|---|---|---|")
    for law in arguments.law or LAWS:
        for plan in PLANS:
            for errors in (0.0, 2.0, 4.0, -4.0):
                row(law, plan, errors, arguments.repetitions)


if __name__ == "__main__":
    main()
