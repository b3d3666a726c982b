"""Exact conditional families on enumerated worlds, sampled and solved."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.dual.solution import Solution, SolveRule
from constrained_dpo.dual.solve import next_point
from constrained_dpo.dual.trial import Trial
from constrained_dpo.estimates.trial import trial
from constrained_dpo.problem import Constraint

Family = Callable[[TabularWorld, pd.Series, float], np.ndarray]


def member(world: TabularWorld, lambda_: pd.Series, kappa: float = 1.0) -> np.ndarray:
    """log π ∝ log π_ref + κ(r + λ·g)/β."""
    score = world.reward + sum(lambda_[n] * world.utilities[n] for n in world.problem.names)
    logp = world.ref_logp + kappa * score / world.problem.beta
    return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)


def draw(world: TabularWorld, logp: np.ndarray, number: int, seed) -> pd.DataFrame:
    rng, weight = np.random.default_rng(seed), np.exp(logp)
    law = weight.cumsum(axis=1) / weight.sum(axis=1, keepdims=True)
    drawn = np.concatenate([np.searchsorted(row, rng.random(number)) for row in law])
    rows = np.repeat(np.arange(len(logp)), number)
    scores = {"r": world.reward} | world.utilities
    return pd.DataFrame(
        {"prompt_id": rows, "policy_logp": logp[rows, drawn]}
        | {"ref_logp": world.ref_logp[rows, drawn]}
        | {name: table[rows, drawn] for name, table in scores.items()}
    )


def by_threshold(world: TabularWorld) -> TabularWorld:
    """The same world with exact levels, so that u's error is the samples' of the policy alone."""
    constraints = tuple(Constraint(n, threshold=float(a)) for n, a in world.levels.items())
    return replace(world, problem=replace(world.problem, constraints=constraints))


def solve(
    world: TabularWorld,
    rule: SolveRule,
    start: pd.Series,
    seed: int,
    family: Family = member,
    number: int = 128,
    shift: float = 0.0,
) -> tuple[Solution, list[Trial]]:
    """Sample trials until `next_point` is done; number: responses of a prompt in a trial."""
    trials: list[Trial] = []
    shifts = dict.fromkeys(world.problem.names, shift)
    while not (point := next_point(trials, rule, start)).done:
        logp = family(world, point.lambda_, point.kappa)
        samples = draw(world, logp, number, (seed, len(trials)))
        if rule.kl_budget is None:
            samples = samples.drop(columns="policy_logp")  # KL would take half of the time
        trials.append(trial(samples, samples, world.problem, point.lambda_, point.kappa, shifts))
    return point, trials
