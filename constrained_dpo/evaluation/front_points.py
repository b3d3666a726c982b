"""One point of a front: a member of a round's family, found by trials or given by λ, sampled and
judged.

A point is a folder of its own: its trials, its samples, and point.json, which is written last. So a
killed search goes on where it stopped.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from constrained_dpo.dual.exact import ExactPolicy
from constrained_dpo.dual.solution import Solution, SolveRule
from constrained_dpo.dual.trial import Trial
from constrained_dpo.estimates.draws import draw_rule
from constrained_dpo.estimates.measure import Measurement, Rule, measure
from constrained_dpo.estimates.sampling_law import why_not_the_policy
from constrained_dpo.estimates.slack import bounded_constraints, prompt_slack, slack_bounds
from constrained_dpo.estimates.verdict import front_confidence
from constrained_dpo.evaluation.front_record import FrontPoint, Setting
from constrained_dpo.evaluation.front_source import KEPT_ADAPTER, FrontSource, of_split
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.problem import by_name
from constrained_dpo.run.family import trial_responses
from constrained_dpo.run.record import read_trials
from constrained_dpo.run.trials import Search, Target, search
from data_prep.files import write_json
from data_prep.labels.multipliers import KAPPA, multiplier_columns
from data_prep.readers.tables import read_parquet, write_parquet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Point:
    """A point under way. look: of all points of the run's fronts; earlier: those that are done."""

    source: FrontSource
    learner: Learner
    setting: Setting
    look: int
    earlier: Sequence[FrontPoint]

    @property
    def key(self) -> str:
        return self.source.key(self.setting)

    @property
    def folder(self) -> Path:
        return self.source.run.front_folder(self.key)

    @property
    def adapter(self) -> Path:
        """The point's member; one that was distilled is kept for an export."""
        return self.folder / (KEPT_ADAPTER if self.source.distilled else ".adapter")

    @property
    def confidence(self) -> float:
        """Of the verdict."""
        dual = self.source.recipe.dual
        return front_confidence(dual.confidence, self.look, dual.rounds)

    def seen(self) -> list[pd.DataFrame]:
        """Slacks by prompt at the setting's levels, in every table of the run."""
        source, problem = self.source, self.source.problem(self.setting)
        columns = ["prompt_id", *problem.columns]
        tables = [
            read_parquet(source.run.front_folder(point.key) / "samples.parquet", columns)
            for point in self.earlier
        ]
        at_recipe = source.slack_of_rounds + [
            prompt_slack(table, source.reference, source.recipe.problem) for table in tables
        ]
        shift = source.recipe.problem.bounds - problem.bounds
        return [slack + shift for slack in at_recipe]


def play_point(
    source: FrontSource,
    learner: Learner,
    setting: Setting,
    look: int,
    earlier: Sequence[FrontPoint],
) -> FrontPoint:
    """Play a point, or go on with it: solve for its λ, sample that member, judge it.

    look: 1, 2, ... over all points of the run's fronts; earlier: points that are done, whose
    samples on the dual prompts tell where λ is to be searched.
    """
    point = _Point(source, learner, setting, look, earlier)
    target = _target(point)
    trials = _search_of(point)
    solution = None
    if setting.lambda_ is None:
        on_dual = of_split(source.reference, "dual")
        known = [target.trial(table, on_dual) for table in _members(point)]
        prompts = source.run.prompts()
        dual = prompts[prompts["split"] == "dual"]
        solution = search(trials, target, source.recipe, learner, dual, on_dual, known)
    member = _member(point, solution)
    samples = _samples(point, *member)
    played = [
        target.trial(read_parquet(file), of_split(source.reference, "dual"))
        for file in trials.files()
    ]
    record = _record(point, member, solution, played, samples)
    write_json(point.folder / "point.json", record.to_json())
    log.info("front: %s: %s", point.key, record.verdict)
    return record


def _target(point: _Point) -> Target:
    """What a point's trials aim at; λ may leave the range that the family was trained on, down to 0
    and up by that range's factor."""
    source, dual = point.source, point.source.recipe.dual
    law, problem, kappa = source.law, source.problem(point.setting), point.setting.kappa
    rule = SolveRule(
        low=0.0 * law.low,
        high=(law.high * law.factor).clip(upper=dual.max_lambda),
        tolerance=dual.tolerance / 2 * source.needed,
        trials=dual.trials,
        kappa=law.kappa if kappa is None else (kappa, kappa),
        kl_budget=source.recipe.objective.kl_budget if kappa is None else None,
    )
    return Target(
        problem=problem,
        rule=rule,
        start=source.recipe.problem.multipliers(source.record.policy_lambda),
        confidence=point.confidence if dual.confidence_side == "lower" else None,
        bounds=slack_bounds(problem, source.recipe.score_ranges, point.seen()),
        test_prompts=of_split(source.reference, "test")["prompt_id"].nunique(),
        responses=source.responses,
    )


def _search_of(point: _Point) -> Search:
    run, key = point.source.run, point.key
    return Search(
        family=point.source.family,
        folder=point.folder / "trials",
        shards=run.path / "shards",
        phase=f"front-{key}-trial",
        source=f"front:{key}:trial",
        round_number=point.source.number,
        responses_per_prompt=trial_responses(point.source.recipe),
    )


def _members(point: _Point) -> list[pd.DataFrame]:
    """Samples of this family's members on the dual prompts that there are already, each with its λ
    and κ: of the round's trials, of its policy, and of earlier points and their trials."""
    source, run = point.source, point.source.run
    tables = list(read_trials(run, source.number) or [])
    samples = of_split(read_parquet(run.samples_file(source.number)), "dual")
    tables.append(_labelled(samples, source.record.policy_lambda, source.record.kappa))
    for other in point.earlier:
        if other.family == source.fingerprint:
            folder = run.front_folder(other.key)
            tables += [read_parquet(f) for f in sorted((folder / "trials").glob("[0-9]*.parquet"))]
            samples = of_split(read_parquet(folder / "samples.parquet"), "dual")
            tables.append(_labelled(samples, other.lambda_, other.kappa))
    kappa = point.setting.kappa
    if kappa is None:
        return tables
    return [table for table in tables if abs(float(table[KAPPA].iloc[0]) - kappa) < 1e-9]


def _labelled(samples: pd.DataFrame, lambda_: dict[str, float], kappa: float) -> pd.DataFrame:
    columns = dict(zip(multiplier_columns(lambda_), lambda_.values(), strict=True))
    return samples.assign(**columns, **{KAPPA: kappa})


def _member(point: _Point, solution: Solution | None) -> tuple[pd.Series, float]:
    """λ and κ of the point."""
    if solution is not None:
        return solution.lambda_, solution.kappa
    setting, source = point.setting, point.source
    kappa = source.record.kappa if setting.kappa is None else setting.kappa
    return source.recipe.problem.multipliers(setting.lambda_ or {}), kappa


def _samples(point: _Point, lambda_: pd.Series, kappa: float) -> pd.DataFrame:
    """Responses of the member to the dual and the test prompts, scored, with their split.

    Every point has the same seeds on the test prompts, so that settings nearby differ by what λ
    does rather than by luck; on the dual prompts each has its own.
    """
    source, file = point.source, point.folder / "samples.parquet"
    if file.exists():
        return read_parquet(file)
    adapter, prompts = point.adapter, source.run.prompts()
    shutil.rmtree(adapter, ignore_errors=True)
    point.folder.mkdir(parents=True, exist_ok=True)
    point.learner.write_member(source.family, lambda_, kappa, adapter)
    tables, shards = [], source.run.shard_folder(f"front-{point.key}")
    for split, phase in (("dual", f"front-{point.key}"), ("test", "front-test")):
        job = Collection(
            phase=phase,
            folder=shards / split,
            source=f"front:{point.key}:{split}",
            responses_per_prompt=source.responses,
            shard_size=source.recipe.sampling.shard_size,
            objectives=source.recipe.problem.columns,
            seed=source.recipe.seed + source.options.seed,
            rule=draw_rule(source.recipe),
            round_number=source.number,
            adapter=adapter,
        )
        drawn = collect(point.learner, of_split(prompts, split), job)
        tables.append(drawn.assign(split=split))
    samples = pd.concat(tables, ignore_index=True)
    write_parquet(samples, file)
    shutil.rmtree(shards, ignore_errors=True)
    return samples


def _record(
    point: _Point,
    member: tuple[pd.Series, float],
    solution: Solution | None,
    trials: list[Trial],
    samples: pd.DataFrame,
) -> FrontPoint:
    """The point from its tables; its adapter goes."""
    source, (lambda_, kappa) = point.source, member
    dual, test = _measured(point, samples)
    outside, kappa_outside = source.outside(lambda_, kappa)
    exact = _exact(point, lambda_, kappa)
    change = _reward_change(source, samples)
    if point.adapter.name != KEPT_ADAPTER:
        shutil.rmtree(point.adapter, ignore_errors=True)
    return FrontPoint(
        key=point.key,
        setting=point.setting,
        round=source.number,
        family=source.fingerprint,
        responses=source.responses,
        seed=source.options.seed,
        look=point.look,
        lambda_=by_name(lambda_),
        kappa=kappa,
        reason="λ was given" if solution is None else solution.reason,
        trials=trials,
        outside=outside,
        kappa_outside=kappa_outside,
        at_edge={} if solution is None else {n: e for n, e in solution.at_edge.items() if e},
        dual=dual,
        test=test,
        reference=source.means(),
        reward_change=float(change.mean()),
        reward_change_se=standard_error(change),
        exact=exact,
    )


def _measured(point: _Point, samples: pd.DataFrame) -> tuple[Measurement, Measurement]:
    """Estimates on the dual and on the test prompts, at the setting's levels."""
    source, problem = point.source, point.source.problem(point.setting)
    ranges, confidence = source.recipe.score_ranges, source.recipe.dual.confidence
    seen = [*point.seen(), prompt_slack(samples, source.reference, problem)]
    bounds, bounded = slack_bounds(problem, ranges, seen), bounded_constraints(problem, ranges)
    reason = why_not_the_policy(source.recipe.sampling, samples, source.reference)
    moved = problem.at_tails_of(of_split(samples, "dual"))
    dual, test = (
        measure(
            of_split(samples, split),
            of_split(source.reference, split),
            at_points,
            rule=Rule(confidence, level, bounds, bounded),
            not_the_policy=reason,
        )
        for split, at_points, level in (
            ("dual", problem, confidence),
            ("test", moved, point.confidence),
        )
    )
    return dual, test


def _reward_change(source: FrontSource, samples: pd.DataFrame) -> pd.Series:
    """By test prompt, the mean reward minus that of the round's own policy: prompts differ more
    than policies, so that a difference is known much better than its terms."""
    reward = source.recipe.problem.reward
    columns = ["prompt_id", "split", reward]
    policy = read_parquet(source.run.samples_file(source.number), columns)
    after, before = (
        of_split(table, "test").groupby("prompt_id")[reward].mean() for table in (samples, policy)
    )
    return after - before


def _exact(point: _Point, lambda_: pd.Series, kappa: float) -> dict[str, ExactPolicy] | None:
    """Exact values of the member by split, where the world can be enumerated; the Lagrangian gap is
    at β/κ, whose maximizer the member is to be, and the objective at the recipe's β."""
    exact, adapter, source = point.learner.exact, point.adapter, point.source
    if exact is None:
        return None
    if not adapter.exists():  # killed between the samples and the record
        point.learner.write_member(source.family, lambda_, kappa, adapter)
    problem = source.problem(point.setting)
    values = exact.policy(adapter, lambda_, replace(problem, beta=problem.beta / kappa))
    return {
        split: value.model_copy(update={"objective": value.reward - problem.beta * value.kl})
        for split, value in values.items()
    }
