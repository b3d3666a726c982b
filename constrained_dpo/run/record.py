"""The record of a round (round.json): a pure function of the run's tables and recipe."""

from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd
from pydantic import Field

from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy
from constrained_dpo.dual.solution import Solution
from constrained_dpo.dual.tails import next_tail_points
from constrained_dpo.dual.trial import Trial
from constrained_dpo.estimates.certificate import Certificate, certify
from constrained_dpo.estimates.draws import describe_draws
from constrained_dpo.estimates.measure import Measurement, Rule, measure
from constrained_dpo.estimates.sampling_law import compare_sampler, why_not_the_policy
from constrained_dpo.estimates.slack import (
    bounded_constraints,
    prompt_slack,
    reference_slack,
    slack_bounds,
)
from constrained_dpo.estimates.verdict import look_confidence
from constrained_dpo.problem import by_name
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import MORE_FITS, RunDirectory
from constrained_dpo.run.family import target_of
from constrained_dpo.run.first_multipliers import initial_multipliers, initial_tail_points
from constrained_dpo.run.multipliers import next_multipliers, steered_on
from constrained_dpo.run.trials import Target
from data_prep.files import read_json
from data_prep.readers.tables import read_parquet
from data_prep.records import Record


class SamplingLaw(Record):
    """How a round's responses were drawn."""

    temperature: float
    top_p: float
    max_new_tokens: int


class RoundRecord(Measurement, Certificate):
    """What a round found. Its own estimates and its certificate are on the dual prompts, those
    under `test` on the test prompts, and so is the verdict.

    lambda_, lambda_next: the multipliers before and after the dual step; step: its kind;
    tail_points, tail_points_next: those of its tails; what is said of test prompts is at the
    quantiles of the policy's samples on the dual prompts. steered_on: the slack that moved λ.
    trials: of a conditional round, whose policy is the family's member at lambda_next and κ
    `kappa`; at_edge: constraints whose root lies beyond an end of the range that the family was
    trained on. seconds: by phase, None where a phase was resumed; hashes: of the run's inputs.
    sampling_cost: of a round whose responses servers drew, seconds until they answered and in our
    own forward beside them (the main process's); sampler: their log-probabilities and draws beside
    ours. sampling_law: how responses were drawn; exact: by split, where every response of the world
    is listed. truncated_scores: by objective, texts that were cut to a scorer's window;
    unlabelled_prompts: fit and dual prompts without a label; processes: of the launch.
    """

    round: int
    lambda_: dict[str, float] = Field(alias="lambda")
    lambda_next: dict[str, float]
    tail_points: dict[str, float] = Field(default_factory=dict)
    tail_points_next: dict[str, float] = Field(default_factory=dict)
    step: str
    steered_on: dict[str, float]
    trials: list[Trial] | None = None
    kappa: float = 1.0
    at_edge: dict[str, str] = Field(default_factory=dict)
    test: Measurement
    verdict: str
    sampling_law: SamplingLaw
    sampler: dict[str, Any] | None = None
    exact: dict[str, ExactPolicy] | None = None
    seconds: dict[str, float | None] = Field(default_factory=dict)
    hashes: dict[str, Any] = Field(default_factory=dict)
    truncated_scores: dict[str, int] = Field(default_factory=dict)
    unlabelled_prompts: int = 0
    sampling_cost: dict[str, float] | None = None
    processes: int = 1

    @property
    def policy_lambda(self) -> dict[str, float]:
        """The multipliers whose maximizer the round's policy is to be."""
        return self.lambda_ if self.trials is None else self.lambda_next

    def exact_on(self, split: str) -> ExactPolicy | None:
        """Give a split's exact values, or those of all prompts where splits are not told apart."""
        return (self.exact or {}).get(split) or (self.exact or {}).get("all")

    def scalars(self) -> dict[str, float]:
        """Name the round's numbers for a tracker, e.g. `u/harmless/test`; those that the sampling
        law does not support are left out."""
        scalars = {f"lambda/{name}": value for name, value in self.lambda_.items()}
        for split, measured in (("dual", self), ("test", self.test)):
            scalars |= {f"u/{name}/{split}": value for name, value in measured.u.items()}
            values = {"reward": measured.reward, "kl": measured.kl, "objective": measured.objective}
            scalars |= {f"{k}/{split}": value for k, value in values.items() if value is not None}
        return scalars


def read_records(run: RunDirectory, rounds: int | None = None) -> list[RoundRecord]:
    """Read the records of a run's first `rounds` rounds (None: of all that are done)."""
    count = run.rounds_done() if rounds is None else rounds
    return [RoundRecord.read(run.round_file(number)) for number in range(count)]


def read_optimum(run: RunDirectory) -> dict[str, ExactOptimum] | None:
    """Read exact.json, by split; None where the world cannot be enumerated."""
    if not run.exact_file.exists():
        return None
    content = read_json(run.exact_file)
    return {split: ExactOptimum.from_json(best, run.exact_file) for split, best in content.items()}


@dataclass(frozen=True)
class RoundTables:
    """What a round's record is computed from. Each table is read once.

    samples, reference: scored responses of π_θ and π_ref on dual and test prompts (column split);
    off_policy: π_ref's on the dual prompts with π_θ's log-probabilities, None where the sampling
    law is not the policy; earlier: the samples of the rounds before, by name; trials: samples of
    the members that were tried, in order, None where nothing is tried.
    """

    number: int
    samples: pd.DataFrame
    reference: pd.DataFrame
    off_policy: pd.DataFrame | None
    earlier: dict[str, pd.DataFrame]
    trials: list[pd.DataFrame] | None = None

    @classmethod
    def read(cls, run: RunDirectory, number: int) -> Self:
        """Read a round's tables from its run."""
        earlier = {f"round {t}": read_parquet(run.samples_file(t)) for t in range(number)}
        samples, reference = (
            read_parquet(run.samples_file(number)),
            read_parquet(run.reference_file),
        )
        off_policy, trials = _off_policy(run, number, reference), read_trials(run, number)
        return cls(number, samples, reference, off_policy, earlier, trials)

    def following(self, run: RunDirectory) -> "RoundTables":
        """Read the next round's tables, with these as the last of the earlier ones."""
        number = self.number + 1
        return RoundTables(
            number,
            read_parquet(run.samples_file(number)),
            self.reference,
            _off_policy(run, number, self.reference),
            self.earlier | {f"round {self.number}": self.samples},
            read_trials(run, number),
        )


def read_trials(run: RunDirectory, number: int) -> list[pd.DataFrame] | None:
    """Read the trials that a round's multipliers rest on; None where nothing is tried."""
    folders = [run.trials_folder(number, attempt) for attempt in range(MORE_FITS, -1, -1)]
    for folder in folders:
        if folder.exists():
            return [read_parquet(file) for file in sorted(folder.glob("[0-9]*.parquet"))]
    return None


def _of_split(table: pd.DataFrame, split: str) -> pd.DataFrame:
    return table[table["split"] == split]


def _off_policy(run: RunDirectory, number: int, reference: pd.DataFrame) -> pd.DataFrame | None:
    if not run.off_policy_file(number).exists():
        return None
    logps = read_parquet(run.off_policy_file(number))
    dual = _of_split(reference, "dual").drop(columns="policy_logp")
    return dual.merge(logps, on=["prompt_id", "response_id"])


def _bounds(
    tables: RoundTables, recipe: Recipe
) -> tuple[dict[str, tuple[float, float]], frozenset[str]]:
    """Bounds of a prompt's slack, and the constraints whose scores have a known range."""
    problem, ranges = recipe.problem, recipe.score_ranges
    seen = [reference_slack(tables.reference, problem)]
    for samples in (*tables.earlier.values(), tables.samples):
        seen.append(prompt_slack(samples, tables.reference, problem))
    return slack_bounds(problem, ranges, seen), bounded_constraints(problem, ranges)


def round_record(
    tables: RoundTables, recipe: Recipe, lambda_: pd.Series, target: Target | None = None
) -> RoundRecord:
    """Compute a round's estimates, verdict, certificate and the next multipliers.

    lambda_: the multipliers that the round's labels were made under, or around; target: what the
    trials of a conditional round aim at.
    """
    solved = _solved(tables, target)
    kappa = 1.0 if solved is None else solved[0].kappa
    problem = replace(recipe.problem, beta=recipe.problem.beta / kappa)
    at = lambda_ if solved is None else solved[0].lambda_
    sampling, confidence = recipe.sampling, recipe.dual.confidence
    reason = why_not_the_policy(sampling, tables.samples, tables.reference)
    splits = {
        split: (_of_split(tables.samples, split), _of_split(tables.reference, split))
        for split in ("dual", "test")
    }
    moved = problem.at_tails_of(splits["dual"][0])
    looks = look_confidence(confidence, tables.number + 1, recipe.dual.rounds)
    bounds, bounded = _bounds(tables, recipe)
    # λ moves by the dual prompts; only what is said of the test prompts pays for other looks.
    dual, test = (
        measure(
            *splits[split],
            at_points,
            rule=Rule(confidence, verdict_confidence, bounds, bounded),
            not_the_policy=reason,
            off_policy=off_policy,
        )
        for split, at_points, verdict_confidence, off_policy in (
            ("dual", problem, confidence, tables.off_policy if reason is None else None),
            ("test", moved, looks, None),
        )
    )
    if reason is None:
        others = {"reference": splits["dual"][1]}
        others |= {name: _of_split(table, "dual") for name, table in tables.earlier.items()}
        certificate = certify(*splits["dual"], others, tables.off_policy, problem, at)
    else:
        certificate = Certificate(certificate_reason=reason)
    slack = steered_on(recipe.dual, dual)
    if solved is None:
        following, step = next_multipliers(recipe, tables.number, lambda_, slack)
    else:
        following, step = solved[0].lambda_, "solved"
    sampler = None
    if sampling.server is not None:
        both = pd.concat([tables.samples, tables.reference], ignore_index=True)
        sampler = compare_sampler(both) | describe_draws(both)
    return RoundRecord(
        **dual.model_dump(),
        **certificate.model_dump(),
        round=tables.number,
        lambda_=by_name(lambda_),
        lambda_next=by_name(following),
        tail_points=problem.tail_points,
        tail_points_next=next_tail_points(*splits["dual"], problem, recipe.dual.max_lambda),
        step=step,
        steered_on=slack,
        **_trial_fields(solved),
        test=test,
        verdict=test.overall,
        sampling_law=SamplingLaw(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
        ),
        sampler=sampler,
    )


Solved = tuple[Solution, list[Trial]]


def _solved(tables: RoundTables, target: Target | None) -> Solved | None:
    """What a conditional round's trials lead to."""
    if target is None or tables.trials is None:
        return None
    reference = _of_split(tables.reference, "dual")
    trials = [target.trial(samples, reference) for samples in tables.trials]
    return target.solve(trials), trials


def _trial_fields(solved: Solved | None) -> dict[str, Any]:
    if solved is None:
        return {}
    solution, trials = solved
    edges = {name: edge for name, edge in solution.at_edge.items() if edge}
    return {"trials": trials, "kappa": solution.kappa, "at_edge": edges}


def replay(run: RunDirectory) -> list[dict[str, float]]:
    """Recompute the λ history from the run's tables and recipe alone.

    It equals state.json's.
    """
    recipe, rounds = run.recipe(), run.state().rounds_done
    recipe = recipe.at_tail_points(initial_tail_points(run, recipe))
    history = [initial_multipliers(run, recipe)]
    tables: RoundTables | None = None
    for _ in range(rounds):
        tables = RoundTables.read(run, 0) if tables is None else tables.following(run)
        record = round_record(
            tables, recipe, history[-1], target_of(run, recipe, history[-1], tables.number)
        )
        history.append(recipe.problem.multipliers(record.lambda_next))
        recipe = recipe.at_tail_points(record.tail_points_next)
    return [by_name(lambda_) for lambda_ in history]
