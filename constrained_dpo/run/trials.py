"""The dual solved by sampling: trials of a family's members, until one meets the levels.

A trial is a file of scored samples on the dual prompts that names its λ; everything else follows
from the files. So a killed search goes on at the same λ, and replay needs nothing more.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from constrained_dpo.dual.solution import Solution, SolveRule
from constrained_dpo.dual.solve import next_point
from constrained_dpo.dual.trial import Trial
from constrained_dpo.estimates.draws import draw_rule
from constrained_dpo.estimates.room import required_room
from constrained_dpo.estimates.slack import Bounds
from constrained_dpo.estimates.trial import trial as measured_trial
from constrained_dpo.launch import is_main, wait
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.schema import Recipe
from data_prep.labels.multipliers import KAPPA, multiplier_columns
from data_prep.readers.tables import read_parquet, write_parquet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a search aims at: u = 0, or room enough for the verdict on `test_prompts` prompts at
    `confidence` (None: u itself). bounds: of a prompt's slack, by constraint."""

    problem: ConstrainedProblem
    rule: SolveRule
    start: pd.Series
    confidence: float | None
    bounds: Bounds
    test_prompts: int
    responses: int

    def room(self, samples: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
        """Give the room above u = 0 that is aimed at, by constraint (score units): what a policy
        with these samples on the dual prompts needs beside π_ref's."""
        if self.confidence is None:
            return dict.fromkeys(self.problem.names, 0.0)
        return required_room(
            samples,
            reference,
            self.problem,
            bounds=self.bounds,
            confidence=self.confidence,
            test_prompts=self.test_prompts,
            responses=self.responses,
        )

    def trial(self, samples: pd.DataFrame, reference: pd.DataFrame) -> Trial:
        """Measure a trial from its table and π_ref's on the dual prompts."""
        names = self.problem.names
        lambda_ = samples.iloc[0][multiplier_columns(names)].set_axis(names).astype(float)
        shift = self.room(samples, reference)
        kappa = float(samples[KAPPA].iloc[0])
        return measured_trial(samples, reference, self.problem, lambda_, kappa, shift)

    def solve(self, trials: Sequence[Trial], earlier: Sequence[Trial] = ()) -> Solution:
        """Find the point to try next, or to keep.

        earlier: trials of the same family that the prediction rests on as well; they use up none of
        the rule's, and its first trial is where they predict the root.
        """
        rule = replace(self.rule, trials=self.rule.trials + len(earlier))
        solution = next_point([*earlier, *trials], rule, self.start)
        if earlier and not trials and not solution.done:
            predicted = next_point(earlier, replace(rule, trials=len(earlier)), self.start)
            return replace(predicted, done=False, reason="the first trial")
        return solution


@dataclass(frozen=True)
class Search:
    """Where a search's trials are, and how they are drawn. phase: names seeds and shards."""

    family: Path
    folder: Path
    shards: Path
    phase: str
    source: str
    round_number: int
    responses_per_prompt: int

    def files(self) -> list[Path]:
        """The trials that are done."""
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def adapter(self, number: int) -> Path:
        """The member of a trial, while it is under way."""
        return self.folder / f".adapter-{number:02d}"

    def shard_folder(self, number: int) -> Path:
        """Committed shards of a trial, while it is under way."""
        return self.shards / self.trial_phase(number)

    def trial_phase(self, number: int) -> str:
        """Name a trial's seeds and shards."""
        return f"{self.phase}-{number:02d}"

    def sweep(self) -> None:
        """Remove what a kill left between a trial's table and the end of the trial."""
        for number in range(len(self.files())):
            for folder in (self.adapter(number), self.shard_folder(number)):
                shutil.rmtree(folder, ignore_errors=True)


def search(
    search_: Search,
    target: Target,
    recipe: Recipe,
    learner: Learner,
    dual: pd.DataFrame,
    reference: pd.DataFrame,
    earlier: Sequence[Trial] = (),
) -> Solution:
    """Try members of a family until the target is met or the trials are used up.

    dual: prompts; reference: π_ref's scored responses to them; earlier: of `Target.solve`. In a
    launch all processes sample.
    """
    if is_main():
        search_.sweep()
    wait()
    done = [target.trial(read_parquet(file), reference) for file in search_.files()]
    while not (solution := target.solve(done, earlier)).done:
        number = len(done)
        table = _played(search_, number, solution, recipe, learner, dual)
        done.append(target.trial(table, reference))
        log.info("%s: trial %d: %s", search_.phase, number, trial_words(done[-1]))
    return solution


def trial_words(trial: Trial) -> str:
    """Say what a trial found in a few words."""
    points = [
        f"{name}: λ {trial.lambda_[name]:.3g}, u {trial.u[name]:+.3g} ± {trial.u_se[name]:.2g}"
        for name in trial.lambda_
    ]
    return ", ".join(points + ([f"κ {trial.kappa:.3g}"] if trial.kappa != 1 else []))


def _played(
    search_: Search,
    number: int,
    point: Solution,
    recipe: Recipe,
    learner: Learner,
    dual: pd.DataFrame,
) -> pd.DataFrame:
    """Sample one member on the dual prompts; its table appears whole."""
    file = search_.folder / f"{number:02d}.parquet"
    adapter = search_.adapter(number)
    if is_main():
        shutil.rmtree(adapter, ignore_errors=True)
        search_.folder.mkdir(parents=True, exist_ok=True)
        learner.write_member(search_.family, point.lambda_, point.kappa, adapter)
    wait()
    job = Collection(
        phase=search_.trial_phase(number),
        folder=search_.shard_folder(number),
        source=f"{search_.source}.{number}",
        responses_per_prompt=search_.responses_per_prompt,
        shard_size=recipe.sampling.shard_size,
        objectives=recipe.problem.columns,
        seed=recipe.seed,
        rule=draw_rule(recipe),
        round_number=search_.round_number,
        adapter=adapter,
    )
    samples = collect(learner, dual, job)
    if is_main():
        columns = dict(zip(multiplier_columns(point.lambda_.index), point.lambda_, strict=True))
        write_parquet(samples.assign(**columns, **{KAPPA: point.kappa}), file)
    wait()  # every process has read the shards
    if is_main():
        search_.sweep()
    return read_parquet(file)
