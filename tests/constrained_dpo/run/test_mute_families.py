"""Rounds that aim at a verdict, and families that do not answer λ yet."""

from dataclasses import dataclass

import pandas as pd
import pytest

from constrained_dpo.learners.tabular import TabularLearner
from constrained_dpo.run.directory import MORE_FITS
from constrained_dpo.run.record import replay
from data_prep.readers.tables import read_parquet
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

SOLVE = ("dual.method=solve", "fit.conditional={}", "dual.confidence_side=none")


@pytest.mark.slow
def test_the_lower_bound_as_target_ends_satisfied(tmp_path):
    """On the test prompts, which no trial saw, in most of ten seeds; and truly so."""
    world, words = random_world(3, prompts=80, responses=40), []
    for seed in range(10):
        overrides = [*SOLVE, f"seed={seed}", "dual.rounds=1", "dual.confidence_side=lower"]
        overrides += ["dual.init={g0: 0.8}", "fit.pairs_per_prompt=1", "dual.trials=5"]
        overrides += ["sampling.responses_per_prompt=8", "dual.responses_per_prompt=32"]
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


MANY = ("dual.responses_per_prompt=128", "dual.init={g0: 0.7}", "fit.refresh=2")


@pytest.mark.slow
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
    pool = run.pool(run.recipe(), 1)
    assert pool["response_id"].is_unique
    assert {f"refresh:0.{2 * attempt}" for attempt in range(more + 1)} <= set(pool["source"])
    assert {f"trial:0.{attempt}.0" for attempt in range(more + 1)} <= set(pool["source"])
    assert replay(run) == run.state().lambda_
    (following,) = play(run, recipe, TabularLearner(world, tabular.prompts), 1)
    assert following.round == 1 and replay(run) == run.state().lambda_
