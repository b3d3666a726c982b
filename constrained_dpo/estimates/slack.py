"""u, the slack of every constraint, from samples of a policy and of π_ref."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from constrained_dpo.estimates.intervals import Interval, mean_interval
from constrained_dpo.estimates.mixed_means import mixed_means
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from data_prep.records import Record
from data_prep.tables import require_columns, require_scores

Bounds = Mapping[str, Interval]
"""By constraint, or by objective: the lowest and highest value, infinite where there is none."""


def prompt_slack(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    off_policy: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Compute the slack on every prompt: the policy's mean of g minus π_ref's and minus b (margin),
    or minus c.

    samples, reference: responses of π_θ and π_ref to the same prompts, under one sampling law;
    off_policy: some of π_ref's with π_θ's log-probabilities, which then sharpen the policy's mean
    (`mixed_means`). (num_prompts, m) by prompt_id, score units; null where a constraint does not
    concern the prompt. A tail's is at the problem's point, and π_ref's at its own quantile
    (`ConstrainedProblem.reference_scores`): the slack is not above the tail's own. Raises UserError
    when the prompts differ.
    """
    names, columns = problem.names, [c.column for c in problem.constraints]
    for frame, where in ((samples, "samples"), (reference, "reference")):
        require_columns(frame, ["prompt_id", *columns], where)
        require_scores(frame, columns, where)
    samples, reference = problem.scores(samples), problem.reference_scores(reference)
    if off_policy is None:
        policy_means = samples.groupby("prompt_id", sort=True)[names].mean()
    else:
        policy_means = mixed_means(samples, problem.scores(off_policy), names)
    reference_means = reference.groupby("prompt_id", sort=True)[names].mean()
    if not policy_means.index.equals(reference_means.index):
        odd = policy_means.index.symmetric_difference(reference_means.index)
        raise UserError(
            f"u is a paired difference, but {len(odd)} prompts are in only one of the two tables, "
            f"e.g. {odd[0]!r}"
        )
    return policy_means - reference_means * problem.relative.astype(float) - problem.bounds


def reference_slack(reference: pd.DataFrame, problem: ConstrainedProblem) -> pd.DataFrame:
    """Compute the slack that π_ref has against itself: every other response of a prompt against the
    rest.

    (num_prompts, m) by prompt_id, score units; prompts with one response are left out.
    """
    return prompt_slack(*halves(reference), problem)


def halves(responses: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Divide responses into two samples of one policy: every other response of a prompt and the
    rest; prompts with one response are left out."""
    odd = responses.groupby("prompt_id").cumcount() % 2 == 1
    answered = responses.loc[odd, "prompt_id"].unique()
    return responses[~odd & responses["prompt_id"].isin(answered)], responses[odd]


def known_bounds(problem: ConstrainedProblem, ranges: Bounds) -> dict[str, Interval]:
    """Give the range of a prompt's slack that follows from the score's, by constraint.

    ranges: of the scores, by objective. With a margin both means move, so the range is twice as
    wide. An end that nothing bounds is infinite.
    """
    bounds = {}
    for constraint, level in zip(problem.constraints, problem.bounds, strict=True):
        scores, measure = ranges.get(constraint.name, (-np.inf, np.inf)), constraint.measure
        low, high = measure.bounds(*scores)
        if constraint.threshold is None:
            least, most = measure.reference_bounds(*scores)
            low, high = low - most, high - least
        bounds[constraint.name] = (float(low - level), float(high - level))
    return bounds


def bounded_constraints(problem: ConstrainedProblem, ranges: Bounds) -> frozenset[str]:
    """Name the constraints for which the score's range bounds a prompt's slack at both ends."""
    bounds = known_bounds(problem, ranges)
    return frozenset(name for name, ends in bounds.items() if np.isfinite(ends).all())


def slack_bounds(
    problem: ConstrainedProblem, ranges: Bounds, seen: Iterable[pd.DataFrame]
) -> dict[str, Interval]:
    """Bound the slack that a prompt can have: by the score's range, else by what was seen.

    ranges: of the scores, by objective; seen: slacks by prompt (`prompt_slack`, `reference_slack`)
    of all tables at hand. Raises ValueError where neither bounds a constraint.
    """
    table = pd.concat(list(seen), ignore_index=True)
    bounds = {}
    for name, (low, high) in known_bounds(problem, ranges).items():
        lowest, highest = float(table[name].min()), float(table[name].max())
        bounds[name] = (low if np.isfinite(low) else lowest, high if np.isfinite(high) else highest)
    return bounds


def estimate_subgradient(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    confidence: float = 0.95,
    bounds: Bounds | None = None,
    verdict_confidence: float | None = None,
    off_policy: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Estimate u_i = E_{π_θ}[g_i] − a_i by the mean over prompts of `prompt_slack`; a prompt is one
    cluster.

    Columns by constraint, score units: u; se; num_prompts; low, high: the two-sided interval at
    `confidence`; one_low: the one-sided lower bound at `verdict_confidence` (default: confidence);
    each_low, each_high: one-sided bounds that hold for all constraints together at that level
    (Bonferroni). bounds: of a prompt's slack, by constraint (`slack_bounds`); None: the smallest
    and largest seen in these two tables. off_policy: as for `prompt_slack`. A tail's u and lower
    bounds are at the problem's point, which is never above the tail's own, and its upper ones at
    the samples' quantile, which maximizes the mean. Source: CAID, arXiv:2505.19387, Algorithm 1,
    the dual's subgradient; `intervals.mean_interval`. Raises UserError when the prompts differ.
    """
    slack = prompt_slack(samples, reference, problem, off_policy)
    moved = problem.at_tails_of(samples)
    above = slack if moved is problem else prompt_slack(samples, reference, moved, off_policy)
    if bounds is None:
        bounds = slack_bounds(problem, {}, [slack, reference_slack(reference, problem)])
    error = 1 - (confidence if verdict_confidence is None else verdict_confidence)
    rows = {}
    for name in problem.names:
        values, ends = slack[name].dropna().to_numpy(np.float64), bounds[name]
        upper = values if above is slack else above[name].dropna().to_numpy(np.float64)
        if off_policy is not None or above is not slack:
            # a weighted mean may pass the score's range, a tail at another point its bounds
            both = np.concatenate([values, upper])
            ends = (min(ends[0], both.min()), max(ends[1], both.max()))
        low, high = _interval(values, upper, confidence, ends)
        each = _interval(values, upper, 1 - 2 * error / len(problem.names), ends)
        rows[name] = {
            "u": float(values.mean()),
            "se": standard_error(values),
            "num_prompts": len(values),
            "low": low,
            "high": high,
            "one_low": mean_interval(values, 1 - 2 * error, ends)[0],
            "each_low": each[0],
            "each_high": each[1],
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=SLACK_COLUMNS)


def _interval(lower: np.ndarray, upper: np.ndarray, confidence: float, ends: Interval) -> Interval:
    """The lower end by one column of slacks, the upper one by another."""
    low, high = mean_interval(lower, confidence, ends)
    return low, high if upper is lower else mean_interval(upper, confidence, ends)[1]


SLACK_COLUMNS = ["u", "se", "num_prompts", "low", "high", "one_low", "each_low", "each_high"]


class Change(Record):
    """An objective's means under both policies and their paired difference with its standard error
    and interval, clustered by prompt (score units)."""

    reference: float
    policy: float
    difference: float
    se: float
    ci_low: float
    ci_high: float


def changes(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    confidence: float,
    ranges: Bounds | None = None,
    extra: Sequence[str] = (),
) -> dict[str, Change]:
    """Compare every objective under two policies.

    samples, reference: responses to the same prompts; ranges: of the scores, where they are known;
    extra: columns of further scores.
    """
    # A margin of 0 over the reference makes u the paired difference itself.
    means = [n for n in dict.fromkeys([problem.reward, *extra]) if n not in problem.names]
    utilities = [replace(c, threshold=None, margin=0.0) for c in problem.constraints]
    constraints = [*(Constraint(name, margin=0.0) for name in means), *utilities]
    differences = ConstrainedProblem("none", 1.0, tuple(constraints))
    objectives = differences.names
    seen = [prompt_slack(samples, reference, differences), reference_slack(reference, differences)]
    bounds = slack_bounds(differences, ranges or {}, seen)
    table = estimate_subgradient(samples, reference, differences, confidence, bounds)
    rows = table.to_dict("index")
    policy_scores = differences.scores(samples)
    reference_scores = differences.reference_scores(reference)
    return {
        name: Change(
            reference=float(reference_scores.groupby("prompt_id")[name].mean().mean()),
            policy=float(policy_scores.groupby("prompt_id")[name].mean().mean()),
            difference=rows[name]["u"],
            se=rows[name]["se"],
            ci_low=rows[name]["low"],
            ci_high=rows[name]["high"],
        )
        for name in objectives
    }
