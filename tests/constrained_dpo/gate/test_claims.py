"""What a gate checks: rooms by prompt against the run's own slack and by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.slack import known_bounds, prompt_slack, reference_slack
from constrained_dpo.gate.build import build_claims
from constrained_dpo.gate.claims import CUT_OFF, LENGTH, Claim
from constrained_dpo.gate.decide import judge_claim, overall
from constrained_dpo.gate.record import FAILED, PASSED, UNDECIDED
from constrained_dpo.gate.refusals import PHRASES, refuses
from constrained_dpo.gate.settings import load_gate
from constrained_dpo.kinds import Measure
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.load import load_recipe
from tests.helpers.paths import QUICKSTART

PROBLEM = ConstrainedProblem(
    "r",
    1.0,
    (
        Constraint("g", margin=0.3),
        Constraint("h", threshold=0.4),
        Constraint("g.tail", margin=0.3, measure=Measure("tail", 0.1, -1.0)),
        Constraint("h.tail", threshold=0.4, measure=Measure("tail", 0.2, 0.5)),
        Constraint("h.rate", threshold=0.4, measure=Measure("rate", at=0.2)),
    ),
)


def responses(seed: int, shift: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    scores = rng.normal(shift, 1.0, (2, 120))
    ids = np.repeat([f"p{i:02d}" for i in range(30)], 4)
    tokens = [list(range(n)) for n in rng.integers(1, 6, 120)]
    table = pd.DataFrame({"prompt_id": ids, "g": scores[0], "h": scores[1]})
    return table.assign(token_ids=tokens, ended=rng.random(120) < 0.7).sample(
        frac=1, random_state=0
    )


@pytest.mark.parametrize("constraint", PROBLEM.constraints, ids=lambda c: c.name)
def test_the_room_of_a_constraint_is_its_slack_with_its_bounds(constraint):
    name, column, measure = constraint.name, constraint.column, constraint.measure
    reference, offset = (-1.0, -0.3) if constraint.threshold is None else (0.0, -0.4)
    claim = Claim(
        "constraint", name, "", column, 1, reference, offset, (-5.0, 4.0), measure=measure
    )
    after, before = responses(1), responses(2)
    slack = prompt_slack(after, before, PROBLEM)[name]
    pd.testing.assert_series_equal(claim.room(after, before), slack, check_names=False)
    itself = reference_slack(before, PROBLEM)[name]
    pd.testing.assert_series_equal(claim.reference_room(before), itself, check_names=False)
    assert claim.bounds([slack]) == pytest.approx(known_bounds(PROBLEM, {name: (-5, 4)})[name])
    open_end = replace(claim, range=(-np.inf, np.inf))
    if measure.kind == "rate":
        assert open_end.bounded
        return
    assert not open_end.bounded
    assert open_end.bounds([slack, itself]) == (
        min(slack.min(), itself.min()),
        max(slack.max(), itself.max()),
    )


def test_length_and_cut_off_are_counted_by_hand():
    after, before = responses(1), responses(2)
    mean = lambda table, values: values.groupby(table["prompt_id"]).mean()
    long = mean(before, before["token_ids"].map(len)) * 1.5 - mean(
        after, after["token_ids"].map(len)
    )
    claim = Claim("length", "length", "", LENGTH, -1, 1.5, 0, (0, 5))
    np.testing.assert_allclose(claim.room(after, before), long)
    assert claim.bounds([long]) == (-5.0, 7.5)
    claim = Claim("cut_off", "cut_off", "", CUT_OFF, -1, 0, 0.5, (0, 1))
    cut = 0.5 - mean(after, (~after["ended"]).astype(float))
    np.testing.assert_allclose(claim.room(after, before), cut)


def test_one_look_is_judged_by_the_projects_own_intervals():
    """Passing at the whole error of the look, failing at a share of it by the number of checks."""
    claim = Claim("constraint", "h", "", "h", 1, 0, -0.4, (-6.0, 6.0))
    after, before = responses(1, shift=1.0), responses(2)
    result = judge_claim(claim, after, before, 0.04, 5)
    rooms = claim.room(after, before).to_numpy()
    assert result.low == mean_interval(rooms, 0.92, (-6.4, 5.6))[0]
    assert result.high == mean_interval(rooms, 1 - 2 * 0.04 / 5, (-6.4, 5.6))[1]
    again = judge_claim(claim, after, before, 0.001, 5, earlier=result)
    assert (again.low, again.high) == (result.low, result.high)  # earlier bounds stay true


def test_all_must_pass_and_one_fails_the_gate():
    assert overall([PASSED, PASSED]) == PASSED
    assert overall([PASSED, UNDECIDED]) == UNDECIDED
    assert overall([UNDECIDED, FAILED, PASSED]) == FAILED
    assert overall([]) == UNDECIDED


def test_refusals_are_whole_words_at_the_opening_whatever_case_and_apostrophe():
    texts = ["I’M  SORRY, but no.", "Ok. " + "so " * 100 + "I cannot", "", "I cannothing", "Sure!"]
    assert refuses(texts, PHRASES).tolist() == [1, 0, 1, 0, 0]


def test_a_gate_lists_its_claims_with_levels_and_ranges():
    recipe = load_recipe(QUICKSTART)
    scorer = {"type": "python", "target": "data_prep.quickstart:helpful", "indicator": 0}
    checks = {
        "constraints": [{"name": "harmless", "level": 0.2}],
        "reward": {"drop": -0.1},
        "second_opinion": [{"name": "kind", "better_by": 0.3, "scorer": scorer}],
        "refusal": {"prompts": "benign.jsonl", "increase": 0.03},
        "length": {"increase": 4},
        "cut_off": {"increase": 0.1},
    }
    claims = {c.title: c for c in build_claims(recipe, load_gate({"checks": checks}))}
    assert {title: c.offset for title, c in claims.items()} == {
        "constraint harmless": -0.2,
        "reward helpful": -0.1,
        "second_opinion kind": -0.3,
        "refusal": 0.03,
        "length": 4,
        "cut_off": 0.1,
    }
    assert claims["second_opinion kind"].range == (0.0, 1.0)
    assert claims["length"].range == (0, recipe.sampling.max_new_tokens)
