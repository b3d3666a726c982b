"""The gate's errors by simulation: seeded, through the gate's own plan, bounds and verdicts."""

import numpy as np
import pytest

from constrained_dpo.gate.record import FAILED, PASSED
from constrained_dpo.gate.spending import look_errors, look_sizes, session_error
from tests.helpers.gates import played

# A share that must be 0.9; both outcomes are common enough for a look to decide.
LEVEL, BOUNDS = 0.9, (-0.9, 0.1)


def share_of_passes(rate: float, budgets: list[int], repetitions: int, seed: int) -> float:
    passed = 0
    for repetition in range(repetitions):
        rng = np.random.default_rng([seed, repetition])
        rooms = (rng.random(budgets[-1]) < rate) - LEVEL
        clear = [np.full(budgets[-1], 0.09)] * 4
        passed += played([rooms, *clear], [BOUNDS] * 5, budgets)[0] == PASSED
    return passed / repetitions


@pytest.mark.slow
def test_a_gate_with_a_check_at_its_level_passes_falsely_in_five_percent_over_ten_extensions():
    """At the boundary, the worst case; the bound allows two standard errors of 600 draws."""
    budgets = [100 + 40 * k for k in range(11)]
    assert share_of_passes(LEVEL, budgets, 600, seed=1) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 600)


@pytest.mark.slow
def test_two_standard_errors_of_room_at_the_planned_size_pass_in_four_of_five():
    planned = 100
    rate = LEVEL + 2 * np.sqrt(LEVEL * (1 - LEVEL) / planned)
    assert share_of_passes(rate, [4 * planned], 200, seed=2) >= 0.8


def test_a_clear_gate_is_decided_in_a_part_of_its_budget_whichever_way():
    rng = np.random.default_rng(0)
    good, bad = rng.normal(1.0, 1.0, 400), rng.normal(-1.0, 1.0, 400)
    verdict, size = played([good, good], [None, None], [400])
    assert (verdict, size <= 120) == (PASSED, True)
    verdict, size = played([good, bad], [None, None], [400])
    assert (verdict, size <= 120) == (FAILED, True)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_all_looks_of_all_sessions_spend_no_more_than_the_error_probability(confidence):
    spent, done = 0.0, 0
    for session in range(1, 200):
        budget = done + 100
        sizes = look_sizes(done, budget)
        errors = look_errors(session_error(confidence, session), done, sizes)
        assert sizes == sorted(set(sizes)) and done < sizes[0] and sizes[-1] == budget
        assert sum(errors) == pytest.approx(session_error(confidence, session))
        spent, done = spent + sum(errors), budget
    assert 0.99 * (1 - confidence) < spent < 1 - confidence
