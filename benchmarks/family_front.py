"""What a family is worth away from its own λ: at other margins, and at other κ. Exact values."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from constrained_dpo import Run
from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.fit.family import read_family, write_member
from constrained_dpo.learners.embedded import EmbeddedValues
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.rounds import last_family

MARGINS = np.linspace(0, 1.5, 11)  # of b
KAPPAS = (0.5, 0.75, 1.0, 1.25, 1.5)
BEYOND = 3.0  # how far above its trained range a family is asked, as a factor
Table = Callable[[float], np.ndarray]  # log π(y | x) at a setting, (num_prompts, num_responses)


def values_of(run: Run) -> EmbeddedValues:
    """Give the exact values of a run's world."""
    with_learner = run._open(run.directory)[1]
    exact = with_learner.exact
    assert isinstance(exact, EmbeddedValues)
    return exact


def member_logps(values: EmbeddedValues, family: Path, lambda_: pd.Series, kappa: float = 1.0):
    """log π(y | x) of a family's member on the dual prompts, (num_prompts, num_responses)."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "member"
        write_member(family, lambda_, kappa, adapter)
        return values.logps("dual", adapter)


def front_of(run: Run, record: RoundRecord) -> list[dict]:
    """Solve eleven margins on the family of a run's last round, for one constraint."""
    values, problem = values_of(run), run.recipe.problem
    (name,) = problem.names
    family = last_family(run.directory, record.round)
    high = BEYOND * read_family(family).high[name]
    at = lambda value: member_logps(values, family, pd.Series({name: value}))
    return front(values.world("dual", problem), at, high)


def front(world: TabularWorld, table: Table, high: float, samples: int = 9) -> list[dict]:
    """For each margin the setting in [0, high] whose policy meets it exactly, its u/b, and its
    regret: P* of that margin less the policy's Lagrangian there, over the gap of the best policy
    without constraint. u increases with the setting; an end of the range stands for what lies
    beyond."""
    problem, (name,) = world.problem, world.problem.names
    seen: dict[float, np.ndarray] = {}

    def logps(setting: float) -> np.ndarray:
        if setting not in seen:
            seen[setting] = table(setting)
        return seen[setting]

    reference = world.evaluate(world.ref_logp)
    base, rise = reference.utilities[name], -reference.u[name]
    free = replace(world, problem=ConstrainedProblem(problem.reward, problem.beta, ()))
    gap = free.exact_optimum.objective - reference.objective

    def risen(setting: float) -> float:
        return world.evaluate(logps(setting)).utilities[name] - base

    settings = np.linspace(0, high, samples)
    heights = [risen(float(setting)) for setting in settings]
    rows = []
    for share in MARGINS:
        margin = float(share) * rise
        setting = _setting(settings, heights, margin, lambda s, m=margin: risen(s) - m)
        own = ConstrainedProblem(problem.reward, problem.beta, (Constraint(name, margin=margin),))
        best = replace(world, problem=own)
        at, lambda_ = best.exact_optimum, pd.Series(best.exact_optimum.lambda_)
        policy = best.evaluate(logps(setting), lambda_)
        rows.append(
            {
                "margin": float(share),
                "setting": setting,
                "lambda_star": at.lambda_[name],
                "u_over_b": policy.u[name] / rise,
                "regret": policy.lagrangian_gap / gap,
                "kl": policy.kl,
            }
        )
    return rows


def _setting(
    settings: np.ndarray, heights: list[float], margin: float, excess: Callable[[float], float]
) -> float:
    above = [k for k, height in enumerate(heights) if height >= margin]
    if not above:
        return float(settings[int(np.argmax(heights))])
    if above[0] == 0:
        return float(settings[0])
    ends = float(settings[above[0] - 1]), float(settings[above[0]])
    return float(brentq(excess, *ends, rtol=1e-3, xtol=1e-3 * float(settings[-1])))


def kappas_of(run: Run, record: RoundRecord) -> list[dict]:
    """The share of the Lagrangian's gap, from π_ref's to the best policy's at λ and β/κ, that the
    members of a run's last family close."""
    values, problem = values_of(run), run.recipe.problem
    lambda_ = problem.multipliers(record.policy_lambda)
    family = last_family(run.directory, record.round)
    rows = []
    for kappa in KAPPAS:
        world = values.world("dual", replace(problem, beta=problem.beta / kappa))
        policy = world.evaluate(member_logps(values, family, lambda_, kappa), lambda_)
        reference = world.lagrangian_gap(world.ref_logp, lambda_)
        rows.append(
            {"kappa": kappa, "closed": 1 - policy.lagrangian_gap / reference, "kl": policy.kl}
        )
    return rows
