"""A run opened, prepared and played: what `Run` and the commands call."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from constrained_dpo.launch import check_launch, is_main, main_first, wait
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.recipe.categories import categorized
from constrained_dpo.recipe.defaults import sized, split_counts
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare, require_same_inputs
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.rounds import play_round
from constrained_dpo.run.steering import reason_to_stop
from constrained_dpo.tracking import require_trackers
from data_prep.prompts.split import split_prompts

log = logging.getLogger(__name__)

Opener = Callable[[RunDirectory], tuple[Recipe, Learner]]
"""Opens a run: its recipe and learner, prepared now where it is not yet."""


@dataclass(frozen=True)
class Played:
    """What a call played.

    records: of its rounds; stopped: why it ended before the number it was told, None: it did not.
    """

    records: list[RoundRecord]
    stopped: str | None


@contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """Hold the run. In a launch the main process has the lock, and the others begin once it has
    it."""
    with run.locked() if is_main() else nullcontext():
        wait()
        yield


def open_prepared(run: RunDirectory) -> tuple[Recipe, LoraLearner]:
    """Open a run's recipe and learner; prepare it where that was not done.

    The run must be held. Raises UserError as `prepare` does, and where policy, scorers, law or
    prompts changed since then.
    """
    recipe = run.recipe()
    require_trackers(recipe.fit.report_to)  # before hours of sampling, not after
    check_launch(recipe.policy)
    done = run.state().prepared
    settings = recipe.prompts, recipe.dual.prompts_per_round, recipe.category_columns
    prompts, left_out = (run.prompts(), {}) if done else split_prompts(*settings)
    recipe = categorized(sized(recipe, split_counts(prompts)), prompts)
    learner = LoraLearner(recipe, prompts, run.score_cache)
    with main_first():
        _ = learner.policy  # merged, trained or downloaded once
    if done:
        require_same_inputs(run, learner)
        return recipe, learner
    left_out |= learner.restrict(recipe.fit.max_length)
    return prepare(run, recipe, learner, left_out), learner


def play(
    run: RunDirectory,
    rounds: int | None = None,
    *,
    until_converged: bool = False,
    forced: bool = False,
    opener: Opener = open_prepared,
) -> Played:
    """Play up to `rounds` more rounds (None: as many as the recipe's dual.rounds leaves).

    Stops earlier where the run has converged (`until_converged`) or where no λ can meet the
    constraints; `forced`: not before the first one. Holds the run meanwhile.
    """
    records: list[RoundRecord] = []
    with held(run):
        recipe, done = run.recipe(), run.rounds_done()
        total = recipe.dual.rounds if rounds is None else done + rounds
        stop = reason_to_stop(run, recipe, until_converged) if done and not forced else None
        if done >= total or stop:
            return Played([], stop)
        recipe, learner = opener(run)
        while done + len(records) < total and not stop:
            records.append(play_round(run, recipe, learner))
            log.info("%s", summary(records[-1], recipe.problem.reward))
            stop = reason_to_stop(run, recipe, until_converged)
    return Played(records, stop)


def summary(record: RoundRecord, reward: str) -> str:
    """Say a round in one line: λ, u on the dual prompts, reward, verdict on the test prompts."""
    moves = [
        f"{n}: λ {v:.4f} → {record.lambda_next[n]:.4f}, u {record.u[n]:+.3f}"
        for n, v in record.lambda_.items()
    ]
    moves.append(f"E[{reward}] {record.reward:+.3f}")
    return f"round {record.round} done: {'; '.join(moves)}; {record.verdict} on test"
