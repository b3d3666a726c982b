"""How far the one-shot λ* can be trusted: over other prompts (bootstrap), fewer samples (stability)
and other margins (sweep).

numpy and scipy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from constrained_dpo.dual.function import PromptTerms, prompt_terms
from constrained_dpo.dual.newton import minimize_dual
from constrained_dpo.dual.one_shot import (
    MIN_HALVED,
    FirstMultipliers,
    extrapolated,
    first_multipliers,
    halves,
    richest,
    solve_one_shot,
)
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem
from data_prep.errors import UserError

REPLICATE_TOLERANCE = 1e-8  # of a replicate's KKT residual, far below its sampling error


STABILITY_REPEATS = 10


STABILITY_SHARES = (8, 4, 2, 1)


@dataclass(frozen=True)
class _Search:
    """A table's minimizer, and what finds that of a resampled one: the first Newton step takes no
    pass."""

    table: ScoreTable
    problem: ConstrainedProblem
    max_lambda: float
    terms: PromptTerms
    reference: np.ndarray

    @classmethod
    def of(cls, table: ScoreTable, problem: ConstrainedProblem, max_lambda: float) -> "_Search":
        solution = solve_one_shot(table, problem, max_lambda=max_lambda)
        terms = prompt_terms(table, solution.lambda_.to_numpy(), problem.beta)
        return cls(table, problem, max_lambda, terms, table.prompt_reference_means())

    def minimizer(self, times: np.ndarray) -> np.ndarray:
        """λ* where each prompt counts so many times, (num_prompts,); (m,)."""
        relative, bounds = self.problem.relative.to_numpy(float), self.problem.bounds.to_numpy()
        if self.table.concerned is not None:
            bounds = bounds * (self.table.concerned * times).sum(axis=1) / times.sum()
        levels = bounds + relative * (self.reference * times).sum(axis=1) / times.sum()
        return minimize_dual(
            self.table,
            self.problem.beta,
            levels,
            self.max_lambda,
            self.terms.lambda_,
            self.terms.point(levels, times),
            prompt_weight=times,
            tolerance=REPLICATE_TOLERANCE,
        ).lambda_


@dataclass(frozen=True)
class Bootstrap:
    """interval: columns low, high by constraint; draws: λ* of every replicate, one column per
    constraint; at_bound: the share of replicates with a multiplier at max_lambda."""

    interval: pd.DataFrame
    draws: pd.DataFrame
    at_bound: float


def bootstrap_multipliers(
    table: ScoreTable,
    problem: ConstrainedProblem,
    replicates: int,
    rng: np.random.Generator,
    max_lambda: float = 1e3,
    confidence: float = 0.95,
) -> Bootstrap:
    """Bootstrap the corrected λ* of `first_multipliers` over prompts (Efron 1979; a prompt is one
    cluster); levels of margins are resampled with them.

    Percentile interval. Each replicate solves the table and both halves of its responses from their
    own minimizers, so that the interval carries the correction for few responses. Raises UserError
    where the table has fewer than MIN_HALVED responses of a prompt: the bias would stay in.
    """
    table = richest(table)
    if int(table.counts.min()) < MIN_HALVED:
        raise UserError(
            f"--bootstrap: {int(table.counts.min())} responses of a prompt are too few to correct "
            f"λ* for their number (at least {MIN_HALVED}), and an interval around it would be "
            "wrong; sample more"
        )
    searches = [_Search.of(part, problem, max_lambda) for part in (table, *halves(table))]
    prompts, draws = len(table.counts), np.empty((replicates, len(problem.names)))
    for draw in draws:
        times = rng.multinomial(prompts, np.full(prompts, 1.0 / prompts)).astype(float)
        whole, first, second = (search.minimizer(times) for search in searches)
        draw[:] = extrapolated(pd.Series(whole), pd.Series((first + second) / 2)).to_numpy()
    tail = 50 * (1 - confidence)
    low, high = (
        np.percentile(draws, [tail, 100 - tail], axis=0) if problem.names else np.empty((2, 0))
    )
    interval = pd.DataFrame({"low": low, "high": high}, index=problem.names)
    return Bootstrap(
        interval,
        pd.DataFrame(draws, columns=problem.names),
        float((draws >= max_lambda).any(axis=1).mean()),
    )


def stability(
    table: ScoreTable,
    problem: ConstrainedProblem,
    rng: np.random.Generator,
    max_lambda: float = 1e3,
    repeats: int = STABILITY_REPEATS,
) -> pd.DataFrame:
    """λ* on random parts of the table: an eighth, a quarter, half and all of the prompts and of the
    responses of each.

    Columns num_prompts, num_responses (the largest of a prompt's), constraint, mean, sd (over
    `repeats` parts drawn without replacement; each repeat's parts are nested) and repeats. A mean
    that moves with num_responses shows the bias of few responses, the sd what num_prompts and
    num_responses cost in noise; beside the whole table the sd is too small, and the whole table has
    none.
    """
    most_prompts, most_responses = len(table.counts), int(table.counts.max())
    prompt_numbers = sorted({max(1, most_prompts // s) for s in STABILITY_SHARES})
    response_numbers = sorted({max(1, most_responses // s) for s in STABILITY_SHARES})
    whole = solve_one_shot(table, problem, max_lambda=max_lambda)
    estimates: dict[tuple[int, int], list[pd.Series]] = {
        (most_prompts, most_responses): [whole.lambda_]
    }
    for _ in range(repeats):
        prompts, ranks = rng.permutation(most_prompts), _response_ranks(table, rng)
        for number, responses in product(prompt_numbers, response_numbers):
            if (number, responses) != (most_prompts, most_responses):
                subset = table.take(np.sort(prompts[:number]), ranks < responses)
                solution = solve_one_shot(
                    subset, problem, max_lambda=max_lambda, start=whole.lambda_
                )
                estimates.setdefault((number, responses), []).append(solution.lambda_)
    rows = []
    for (number, responses), solved in sorted(estimates.items()):
        lambdas = pd.DataFrame(solved)
        for name in problem.names:
            rows.append(
                (number, responses, name, lambdas[name].mean(), lambdas[name].std(), len(solved))
            )
    return pd.DataFrame(
        rows, columns=["num_prompts", "num_responses", "constraint", "mean", "sd", "repeats"]
    )


def _response_ranks(table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
    """A random order of every prompt's responses: (num_responses,) ranks from 0."""
    keys, ranks = rng.random(len(table.reward)), np.empty(len(table.reward), np.int64)
    order = np.lexsort([keys, np.repeat(np.arange(len(table.counts)), table.counts)])
    ranks[order] = np.arange(len(order)) - np.repeat(table.starts, table.counts)
    return ranks


@dataclass(frozen=True)
class SweepPoint:
    """One setting of the sweep: its margins and thresholds by constraint, and λ* there."""

    bounds: pd.Series
    first: FirstMultipliers


def sweep(
    table: ScoreTable,
    problem: ConstrainedProblem,
    grid: dict[str, list[float]],
    max_lambda: float = 1e3,
) -> Iterator[SweepPoint]:
    """Find λ* (`first_multipliers`) at every combination of the grid's values (margin or threshold,
    as the problem's constraint is), each started from the last.

    grid: values by constraint; constraints that it does not name keep their level.
    """
    previous, table = None, richest(table)
    for values in product(
        *[grid.get(c.name, [problem.bounds[c.name]]) for c in problem.constraints]
    ):
        constraints = tuple(c.at(v) for c, v in zip(problem.constraints, values, strict=True))
        setting = ConstrainedProblem(problem.reward, problem.beta, constraints)
        first = first_multipliers(table, setting, max_lambda, previous)
        previous = None if first.plain.at_bound else first.plain.lambda_
        yield SweepPoint(setting.bounds, first)
