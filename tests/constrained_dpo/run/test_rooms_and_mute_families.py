"""Rounds that aim at a verdict, and families that do not answer λ yet."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.estimates.room import POWER, test_room as room_of
from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.run.directory import MORE_FITS
from constrained_dpo.run.record import replay
from data_prep.tables import read_parquet
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

SOLVE = ("dual.method=solve", "fit.conditional={}")


def scores(rng, prompts: int, responses: int, between: float, law: str) -> pd.DataFrame:
    """Of a policy whose true slack is 0: prompts differ by `between`, responses by 1."""
    draw = {
        "normal": lambda size: rng.normal(size=size),
        "rare failures": lambda size: (0.1 - (rng.random(size) < 0.1)) / 0.3,
    }[law]
    values = between * rng.normal(size=(prompts, 1)) + draw((prompts, responses))
    ids = np.repeat([f"p{i:03d}" for i in range(prompts)], responses)
    return pd.DataFrame({"prompt_id": ids, "g": values.ravel(), "r": 0.0})


@pytest.mark.parametrize("law", ["normal", "rare failures"])
@pytest.mark.parametrize(
    ("dual", "few", "test", "many"), [(48, 8, 48, 32), (96, 32, 24, 8), (200, 16, 200, 64)]
)
def test_with_the_room_nine_of_ten_test_sets_say_satisfied(law, dual, few, test, many):
    """A policy that shows that much on its dual prompts: its true slack is what it shows less the
    noise of what it shows. Sampled afresh on both sets of prompts, again and again."""
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.0),))
    rng, satisfied, confidence, draws = np.random.default_rng(0), [], 0.975, 300
    ends = (-6.0, 6.0)
    for _ in range(draws):
        samples = scores(rng, dual, few, 0.5, law)
        reference = samples.assign(g=0.0)
        rooms = room_of(
            samples,
            reference,
            problem,
            bounds={"g": ends},
            confidence=confidence,
            test_prompts=test,
            responses=many,
        )
        # the search ends where the dual prompts show just this room
        shift = rooms["g"] - samples["g"].mean()
        values = scores(rng, test, many, 0.5, law).groupby("prompt_id")["g"].mean() + shift
        low, _ = mean_interval(values.to_numpy(), 2 * confidence - 1, ends)
        satisfied.append(low > 0)
    assert POWER - 0.07 < np.mean(satisfied) < 0.98


def test_the_lower_bound_as_target_ends_satisfied(tmp_path):
    """On the test prompts, which no trial saw, in most of ten seeds; and truly so."""
    world = random_world(3, prompts=120, responses=40)
    words = []
    for seed in range(10):
        overrides = [*SOLVE, f"seed={seed}", "dual.rounds=1", "dual.confidence_side=lower"]
        overrides += ["dual.init={g0: 0.8}", "fit.pairs_per_prompt=1", "dual.trials=5"]
        run, recipe, learner = make_run(tmp_path / str(seed) / "run", world, overrides)
        (record,) = play(run, recipe, learner, 1)
        shift = record.trials[-1].shift["g0"]
        assert 0 < shift < 0.5 and record.u["g0"] > 0
        words.append(record.verdict)
        assert record.verdict != "satisfied" or record.exact_on("test").u["g0"] > 0
    assert words.count("satisfied") >= 7 and "violated" not in words


@dataclass(frozen=True)
class Mute(TabularLearner):
    """A family whose members ignore λ, until it was fitted `deaf` times more."""

    deaf: int = MORE_FITS + 1

    def write_member(self, family, lambda_, kappa, output) -> None:
        attempt = int(family.name.partition("-")[2] or 0)
        answers = attempt >= self.deaf or family.name.isdigit() or family.name == "policy"
        super().write_member(family, lambda_ if answers else pd.Series({"g0": 0.3}), kappa, output)


MANY = ("dual.responses_per_prompt=256", "dual.init={g0: 0.7}", "fit.refresh=2")


@pytest.mark.parametrize("deaf", [1, MORE_FITS + 1])
def test_a_family_that_does_not_answer_is_fitted_further(tmp_path, caplog, deaf):
    world = random_world(3, prompts=60, responses=40)
    run, recipe, tabular = make_run(tmp_path / "run", world, [*SOLVE, *MANY])
    learner = Mute(world, tabular.prompts, deaf)
    (record,) = play(run, recipe, learner, 1)
    more = min(deaf, MORE_FITS)
    for attempt in range(MORE_FITS + 1):
        fitted = attempt <= more
        assert run.family_folder(0, attempt).exists() == fitted
        assert run.trials_folder(0, attempt).exists() == fitted
        for stretch in (2 * attempt, 2 * attempt + 1):
            assert run.labels_file(0, False, stretch).exists() == fitted
    warnings = [line for line in caplog.messages if "does not answer λ yet" in line]
    assert len(warnings) == more
    assert warnings[0] == "round 0: u of g0 does not answer λ yet; the family is fitted further"
    lambdas = [trial.lambda_["g0"] for trial in record.trials]
    tables = [read_parquet(f) for f in sorted(run.trials_folder(0, more).glob("*.parquet"))]
    assert lambdas == [table["lambda/g0"].iloc[0] for table in tables]  # the last family's alone
    if deaf == 1:
        assert abs(record.exact_on("dual").u["g0"]) < 0.1 and record.at_edge == {}
    pool = run.pool(1)
    assert pool["response_id"].is_unique
    assert {f"refresh:0.{2 * attempt}" for attempt in range(more + 1)} <= set(pool["source"])
    assert {f"trial:0.{attempt}.0" for attempt in range(more + 1)} <= set(pool["source"])
    assert replay(run) == run.state().lambda_
    (following,) = play(run, recipe, TabularLearner(world, tabular.prompts), 1)
    assert following.round == 1 and replay(run) == run.state().lambda_
