"""What a family is worth away from its own λ: at other margins, and at other κ. Exact values."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo import Run
from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.fit.family import read_family, write_member
from constrained_dpo.learners.embedded import EmbeddedValues
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.run.fits import last_family
from constrained_dpo.run.play import open_prepared
from constrained_dpo.run.record import RoundRecord

MARGINS = np.linspace(0, 1.5, 11)  # of b
KAPPAS = (0.5, 0.75, 1.0, 1.25, 1.5)
EXACT, STEPS = 0.002, 12  # of b, that a margin is solved to; and in how many steps at most
BEYOND = 3.0  # how far above its trained range a family is asked, as a factor
Table = Callable[[float], np.ndarray]  # log π(y | x) at a setting, (num_prompts, num_responses)


def values_of(run: Run) -> EmbeddedValues:
    """Give the exact values of a run's world, whose answers are few enough to list."""
    return EmbeddedValues(open_prepared(run.directory)[1])


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
    reference = world.evaluate(world.ref_logp)
    base, rise = reference.utilities[name], -reference.u[name]
    free = replace(world, problem=ConstrainedProblem(problem.reward, problem.beta, ()))
    gap = free.exact_optimum.objective - reference.objective
    heights: dict[float, float] = {}  # rise of the utility in shares of b, by setting
    logps: dict[float, np.ndarray] = {}

    def ask(setting: float) -> float:
        if setting not in heights:
            logps[setting] = table(setting)
            utility = world.evaluate(logps[setting]).utilities[name]
            heights[setting] = (utility - base) / rise
        return heights[setting]

    for setting in np.linspace(0, high, samples):
        ask(float(setting))
    rows = []
    for share in map(float, MARGINS):
        setting = _setting(ask, heights, share)
        own = Constraint(name, margin=share * rise)
        best = replace(world, problem=replace(problem, constraints=(own,)))
        optimum = best.exact_optimum
        policy = best.evaluate(logps[setting], pd.Series(optimum.lambda_))
        rows.append(
            {
                "margin": share,
                "setting": setting,
                "lambda_star": optimum.lambda_[name],
                "u_over_b": policy.u[name] / rise,
                "regret": policy.lagrangian_gap / gap,
                "kl": policy.kl,
            }
        )
    return rows


def _setting(ask: Callable[[float], float], heights: dict[float, float], share: float) -> float:
    """Find the setting at which the utility has risen by a share of b; the ends stand for what
    lies beyond."""
    for _ in range(STEPS):
        settings = sorted(heights)
        above = [k for k, setting in enumerate(settings) if heights[setting] >= share]
        if not above:
            return max(settings, key=lambda setting: heights[setting])
        if above[0] == 0:
            return settings[0]
        ends = settings[above[0] - 1 : above[0] + 1]
        nearest = min(ends, key=lambda setting: abs(heights[setting] - share))
        if abs(heights[nearest] - share) < EXACT:
            return nearest
        ask(float(np.interp(share, [heights[end] for end in ends], ends)))
    return min(heights, key=lambda setting: abs(heights[setting] - share))


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
