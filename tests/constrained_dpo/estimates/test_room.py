"""The room that a verdict on the test prompts needs, against simulation of its stated law."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.room import required_room
from constrained_dpo.problem import ConstrainedProblem, Constraint


def scores(rng, prompts: int, responses: int, law: str) -> np.ndarray:
    """Of a policy whose true slack is 0: prompts differ by 0.5, responses by 1; (prompts,
    responses)."""
    shape = (prompts, responses)
    draw = rng.normal(size=shape) if law == "normal" else (0.1 - (rng.random(shape) < 0.1)) / 0.3
    return 0.5 * rng.normal(size=(prompts, 1)) + draw


@pytest.mark.parametrize(("law", "low"), [("normal", -8.0), ("rare failures", -2.0)])
@pytest.mark.parametrize(
    ("dual", "few", "test", "many"),
    [
        (48, 8, 48, 32),
        pytest.param(96, 32, 24, 8, marks=pytest.mark.slow),
        pytest.param(60, 16, 120, 64, marks=pytest.mark.slow),
    ],
)
def test_with_the_room_nine_of_ten_test_sets_say_satisfied(law, low, dual, few, test, many):
    """The room is measured on a trial of a few responses; the policy ends where as many as in the
    re-scoring show just that room on the dual prompts, and other prompts judge it."""
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.0),))
    rng, satisfied, confidence = np.random.default_rng(0), [], 0.975
    names = [f"p{i:03d}" for i in range(dual)]
    for _ in range(100):
        shown, judged = (scores(rng, n, many, law) for n in (dual, test))
        trial = scores(rng, dual, few, law) if few > many else shown[:, :few]
        samples = pd.DataFrame({"prompt_id": np.repeat(names, few), "g": trial.ravel(), "r": 0.0})
        room = required_room(
            samples,
            samples.assign(g=0.0),
            problem,
            bounds={"g": (low, 8.0)},
            confidence=confidence,
            test_prompts=test,
            responses=many,
        )["g"]
        values = judged.mean(axis=1) + room - shown.mean()
        bound, _ = mean_interval(values, 2 * confidence - 1, (min(low, values.min()), 8.0))
        satisfied.append(bound > 0)
    assert 0.81 <= np.mean(satisfied) <= 0.98


def test_the_room_is_of_each_constraint_and_grows_with_what_is_at_stake():
    """A farther worst case, fewer test prompts and a higher confidence ask for more."""
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.0), Constraint("h", margin=0)))
    rng = np.random.default_rng(1)
    samples = pd.DataFrame({"prompt_id": np.repeat([f"p{i:02d}" for i in range(40)], 8), "r": 0.0})
    samples = samples.assign(g=rng.normal(size=320), h=0.1 * rng.normal(size=320))
    usual = {"confidence": 0.95, "test_prompts": 40, "responses": 8}

    def rooms(low: float = -6.0, **changes) -> dict[str, float]:
        bounds = {"g": (low, 6.0), "h": (-1.0, 1.0)}
        reference = samples.assign(g=0.0, h=0.0)
        return required_room(samples, reference, problem, bounds=bounds, **usual | changes)

    rooms_usual = rooms()
    assert 0 < 2 * rooms_usual["h"] < rooms_usual["g"]
    for changed in (rooms(-12.0), rooms(test_prompts=20), rooms(confidence=0.99)):
        assert changed["g"] > 1.1 * rooms_usual["g"]
    assert rooms(responses=64)["g"] < 0.9 * rooms_usual["g"]
    flat = samples.assign(g=0.0)
    bounds = {"g": (-1.0, 1.0), "h": (-1.0, 1.0)}
    without_spread = required_room(flat, flat, problem, bounds=bounds, **usual)
    assert 0 < without_spread["g"] < 0.2  # no spread is no knowledge: the worst case still counts
