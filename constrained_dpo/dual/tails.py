"""The points of tail constraints that leave the most objective.

At points t a tail is a mean, and the problem convex; P*(t) is its optimum. The tail itself is the
largest such mean over t, so the best policy under the tail is the best over all t. A step takes t
to the quantile of the maximizer: there the tail is larger, so that the maximizer is still allowed
and P*(t) does not fall. It ends where t rests; several starts, because P*(t) may have several tops.
Source: R. Rockafellar and S. Uryasev, Journal of Risk 2, 2000, whose joint maximization over policy
and t this does in turns.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem
from data_prep.labels.lagrangian import lagrangian_score

LOG_PROBABILITIES = ["sample_logp", "ref_logp"]

MAX_STEPS = 20

START_SHARES = (1.0, 3.0, 6.0)
"""Where a search starts: at the reference policy's quantiles of the share α times these."""

Step = Callable[[ConstrainedProblem], tuple[float, ConstrainedProblem]]
"""P*(t) of a problem with points t, and the problem at the quantiles of its maximizer."""


def best_tails(starts: Iterable[ConstrainedProblem], step: Step) -> ConstrainedProblem:
    """Give the problem at the points with the largest P*(t), from several starts."""
    tops = []
    for problem in starts:
        value, best = -np.inf, problem
        for _ in range(MAX_STEPS):
            here, moved = step(problem)
            if here > value:
                value, best = here, problem
            if moved.tail_points == problem.tail_points:
                break
            problem = moved
        tops.append((value, best))
    return max(tops, key=lambda pair: pair[0])[1]


def starts_at(
    problem: ConstrainedProblem, at_tails: Callable[[ConstrainedProblem], ConstrainedProblem]
) -> list[ConstrainedProblem]:
    """List the starts of a search; at_tails: puts a problem's tails at the reference policy's
    quantiles."""
    points = [at_tails(problem.with_tail_shares(factor)).tail_points for factor in START_SHARES]
    return [problem.with_tail_points(p) for p in points]


def first_tail_points(
    reference: pd.DataFrame, problem: ConstrainedProblem, max_lambda: float
) -> dict[str, float]:
    """Find the points that a run starts with, by constraint (score units).

    reference: scored responses of π_ref, which stand for all answers that a policy can give.
    """
    if not problem.has_tails:
        return {}

    def step(at: ConstrainedProblem) -> tuple[float, ConstrainedProblem]:
        solution = solve_one_shot(ScoreTable.from_frame(reference, at), at, max_lambda=max_lambda)
        weights = tilted_weights(reference, at, solution.lambda_)
        return solution.dual_value, at.at_tails_of(reference, weights)

    starts = starts_at(problem, lambda other: other.at_tails_of(reference))
    return best_tails(starts, step).tail_points


def next_tail_points(
    samples: pd.DataFrame, reference: pd.DataFrame, problem: ConstrainedProblem, max_lambda: float
) -> dict[str, float]:
    """Find the points that a run goes on with, by constraint (score units).

    samples: of the round's policy, reference: of π_ref, on the same prompts, both scored. Where the
    samples have log-probabilities, they are weighted into what the maximizer that meets the levels
    would answer: its quantile, not that of a policy which is short of its levels, is where the tail
    is to be lifted. Without, it is the samples' own quantile.
    """
    if not problem.has_tails:
        return {}
    at_samples = problem.at_tails_of(samples)
    if samples[LOG_PROBABILITIES].isna().any(axis=None):
        return at_samples.tail_points
    log_weight = samples["ref_logp"] - samples["sample_logp"]
    weighted = samples.assign(log_weight=log_weight)
    means = problem.reference_scores(reference).groupby("prompt_id")[problem.names].mean().mean()
    levels = problem.levels(means)
    fixed = replace(
        problem,
        constraints=tuple(
            replace(c, margin=None, threshold=float(levels[c.name])) for c in problem.constraints
        ),
    )

    def step(at: ConstrainedProblem) -> tuple[float, ConstrainedProblem]:
        table = ScoreTable.from_frame(weighted, at, "log_weight")
        solution = solve_one_shot(table, at, max_lambda=max_lambda)
        weights = tilted_weights(weighted, at, solution.lambda_, log_weight)
        return solution.dual_value, at.at_tails_of(weighted, weights)

    starts = [fixed, fixed.with_tail_points(at_samples.tail_points)]
    return best_tails(starts, step).tail_points


def tilted_weights(
    responses: pd.DataFrame,
    problem: ConstrainedProblem,
    lambda_: pd.Series,
    log_weight: pd.Series | float = 0.0,
) -> np.ndarray:
    """Weigh responses as the maximizer at λ does, (num_responses,): exp((r + λ·g)/β) π_ref/q, its
    sum 1 for every prompt.

    log_weight: (num_responses,) log π_ref/q of the policy q that drew them, 0 for π_ref's.
    """
    scores = lagrangian_score(problem.scores(responses), problem.reward, lambda_)
    prompts = responses["prompt_id"]
    logs = pd.Series(scores / problem.beta, index=responses.index) + log_weight
    weight = pd.Series(
        np.exp((logs - logs.groupby(prompts).transform("max")).to_numpy(np.float64)),
        index=logs.index,
    )
    return (weight / weight.groupby(prompts).transform("sum")).to_numpy(np.float64)
