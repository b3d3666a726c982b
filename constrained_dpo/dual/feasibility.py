"""Can the constraints be met at all? The largest slack that samples support, and how much evidence
is behind it. numpy and scipy only.

Over policies that only reweight the samples of each prompt, LP duality gives

    max_π min_i (E_π[g_i] − a_i)/s_i
        = min_{μ ≥ 0, Σμ = 1} E_x max_k Σ_i μ_i (g_i(x, y_k) − a_i)/s_i ,

the limit of D(λ)/|λ| as λ = |λ| μ/s grows: where it is negative, D has no minimizer and λ only
grows. The weights π_ref/q of samples of another policy q change D, but not this limit, which asks
only which responses were seen. s_i is the std of g_i within prompts, so that "the least slack"
means the same for every scorer.

What was never sampled may still exist, so samples alone prove nothing impossible: only a level
above the highest score that there can be does. Source: Lagrangian duality of problem (P) of CAID,
arXiv:2505.19387, at β = 0, r = 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import optimize

from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.problem import ConstrainedProblem

FEASIBLE, NEARLY, INFEASIBLE, NO_EVIDENCE = (
    "feasible",
    "nearly infeasible, undecided",
    "infeasible",
    "not enough evidence",
)

MAX_CUTS = 200


@dataclass(frozen=True)
class Feasibility:
    """What samples say about the constraints.

    verdict: feasible, "nearly infeasible, undecided" (the slack is within 2 se of 0), infeasible
    (the level is above the highest score that there can be), or "not enough evidence" (the samples
    do not reach it, others might). constraints: those the verdict is about; together: each alone
    can be met, but not all of them at once. demanded: the margin or threshold by constraint;
    largest: the largest one that the samples support, for that constraint alone. shortfall: by how
    much to lower each of `constraints` (score units; 0 where feasible). slack, se: the largest
    least slack over those constraints, in stds of the utilities within prompts, and its standard
    error over prompts (inf for one prompt).
    """

    verdict: str
    constraints: tuple[str, ...]
    together: bool
    demanded: pd.Series
    largest: pd.Series
    shortfall: pd.Series
    slack: float
    se: float
    num_prompts: int

    def sentence(self) -> str:
        """Say the verdict, what it rests on and what to do, in one line."""
        names, plural = " and ".join(self.constraints), "s" * (len(self.constraints) > 1)
        limits = " and ".join(
            f"{self.largest[n]:.4g} of {self.demanded[n]:.4g} asked" for n in self.constraints
        )
        cuts = " and ".join(f"{self.shortfall[n]:.4g}" for n in self.constraints)
        evidence = (
            f"slack {self.slack:+.3g} ± {self.se:.2g} std at best, {self.num_prompts} prompts"
        )
        reach = f"these samples reach {limits}{', each alone' * self.together} ({evidence})"
        lower = f"lower the level{plural} by at least {cuts}"
        head = f"{names}: {self.verdict}{' together' * self.together}"
        if self.verdict == FEASIBLE:
            return (
                f"{head}: {reach}; the multipliers it takes are above their bound: raise the bound"
            )
        if self.verdict == INFEASIBLE:
            return f"{head}: the level{plural} lie above the highest score; {reach}; {lower}"
        if self.verdict == NEARLY:
            return f"{head}: {reach}; sample more prompts, or lower the level{plural}"
        few = (
            "one prompt has no sampling error"
            if self.num_prompts == 1
            else "better responses may exist that were not sampled"
        )
        return f"{head}: {reach}, but {few}; sample more, or {lower}"


@dataclass(frozen=True)
class _Best:
    """Per prompt, for one direction μ: the largest score, (num_prompts,), and E[g] over the
    responses that attain it, (m, num_prompts)."""

    value: np.ndarray
    utilities: np.ndarray


def diagnose_feasibility(
    table: ScoreTable,
    problem: ConstrainedProblem,
    levels: pd.Series | None = None,
    ceilings: Mapping[str, float] | None = None,
) -> Feasibility:
    """Judge whether the constraints can be met by reweighting the samples of `table` (of any policy
    that covers π_ref).

    levels: a_i by constraint; None takes them from the table's own reference means, and the
    standard error is then that of the paired difference to them; with given levels it is that of
    the samples alone. ceilings: the highest score that there can be, by constraint, where it is
    known; *infeasible* is said only where a level lies above it by 2 standard errors. The problem
    has at least one constraint.
    """
    names, m = problem.names, len(problem.names)
    reference = table.prompt_reference_means() * problem.relative.to_numpy(float)[:, None]
    offsets = reference + problem.bounds.to_numpy()[:, None]
    if levels is not None:
        given = levels.reindex(names).to_numpy(np.float64)
        offsets = np.repeat(given[:, None], len(table.counts), axis=1)
    if table.concerned is not None:
        offsets = offsets * table.concerned
    target = offsets.mean(axis=1)
    spread = table.within_spread()
    shares = table.shares
    unit = np.where(spread > 1e-12 * (1 + np.abs(target)), spread, 1.0)
    # a mean over all prompts, in these units, is that over the prompts that are concerned
    scale = unit * shares
    alone = [_best(table, axis) for axis in np.eye(m)]
    largest = (
        pd.Series([best.value.mean() for best in alone] / shares, index=names, dtype=float)
        + problem.bounds
        - target / shares
    )
    singles = []
    for i, name in enumerate(names):
        single = _judge(
            [name],
            problem.bounds,
            largest,
            (alone[i].value - offsets[i]) / scale[i],
            pd.Series(unit[i], index=[name]),
        )
        ceiling = (ceilings or {}).get(name, np.inf)
        above = ceiling + 2 * standard_error(offsets[i]) / shares[i] < target[i] / shares[i]
        if single.verdict == NO_EVIDENCE and above:
            single = replace(single, verdict=INFEASIBLE)
        singles.append(single)
    # A constraint that nearly fails alone may fail firmly together with others, so only firm
    # words end the search here.
    if firm := [single for single in singles if single.verdict in (INFEASIBLE, NO_EVIDENCE)]:
        return _together(firm)
    direction = _least_slack(table, target, scale)
    weight = direction / scale
    values = _best(table, weight).value - (weight[:, None] * offsets).sum(axis=0)
    conflict = [name for name, mu in zip(names, direction, strict=True) if mu > 0]
    units = pd.Series(unit, index=names)[conflict]
    return _judge(conflict, problem.bounds, largest, values, units)


def _together(firm: list[Feasibility]) -> Feasibility:
    """One verdict for constraints that fail each alone: the firmer word, about those that earned
    it."""
    word = INFEASIBLE if any(single.verdict == INFEASIBLE for single in firm) else NO_EVIDENCE
    named = [single for single in firm if single.verdict == word]
    worst = min(named, key=lambda single: single.slack)
    return replace(
        worst,
        constraints=tuple(single.constraints[0] for single in named),
        shortfall=pd.concat([single.shortfall for single in named]),
    )


def _judge(
    names: list[str], demanded: pd.Series, largest: pd.Series, values: np.ndarray, unit: pd.Series
) -> Feasibility:
    """The verdict from the slack by prompt, values (num_prompts,) in units of `unit` (by
    constraint)."""
    slack, count = float(values.mean()), len(values)
    slack = 0.0 if abs(slack) < 1e-10 else slack  # rounding
    se = standard_error(values)
    if slack >= 2 * se or (slack >= 0 and count == 1):
        verdict = FEASIBLE
    else:
        verdict = NEARLY if slack > -2 * se and count > 1 else NO_EVIDENCE
    shortfall = max(-slack, 0.0) * unit
    together = len(names) > 1
    return Feasibility(
        verdict, tuple(names), together, demanded, largest, shortfall, slack, se, count
    )


def _best(table: ScoreTable, direction: np.ndarray, tie: float = 1e-12) -> _Best:
    """The responses that maximize Σ_i μ_i g_i on each prompt; direction: μ (m,). A score within
    `tie` of the largest, relative to 1 + |largest|, counts as equal."""
    m, prompts = table.utilities.shape[1], len(table.counts)
    best = _Best(np.zeros(prompts), np.zeros((m, prompts)))
    for block in table.blocks():
        columns, at = [block.of(g) for g in table.utilities.T], block.prompts
        law = block.of(table.log_weight)
        law = np.exp(law - block.spread(block.max(law)))
        weighted = (mu * column for mu, column in zip(direction, columns, strict=True))
        score = sum(weighted, np.zeros_like(law))
        top = block.max(score)
        # ties share the weight as the samples' law does
        tied = law * (score >= block.spread(top - tie * (1 + np.abs(top))))
        best.value[at] = top
        for i, column in enumerate(columns):
            best.utilities[i, at] = block.dot(tied, column) / block.sum(tied)
    return best


def _least_slack(table: ScoreTable, target: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The minimizing μ on the simplex (m,), exactly 0 for constraints that do not limit the
    slack."""
    direction = _cutting_planes(table, target, unit, np.full(len(target), 1.0 / len(target)))
    involved = direction > 1e-6
    if not involved.all():
        faces = ScoreTable(
            table.reward, table.utilities[:, involved], table.log_weight, table.starts, table.counts
        )
        start = direction[involved] / direction[involved].sum()
        direction = np.zeros_like(direction)
        direction[involved] = _cutting_planes(faces, target[involved], unit[involved], start)
    return direction


def _cutting_planes(
    table: ScoreTable, target: np.ndarray, unit: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """`_least_slack` from the direction `start`.

    Kelley's cutting planes: each μ tried gives a policy (the best responses under it) with slack
    vector v; the next μ minimizes the largest μ·v, a linear program of size m.
    """
    m, direction = len(target), start
    cuts: list[np.ndarray] = []
    value, best_direction = np.inf, direction
    for _ in range(MAX_CUTS):
        vertex = _best(table, direction / unit)
        cuts.append((vertex.utilities.mean(axis=1) - target) / unit)
        if (reached := float(direction @ cuts[-1])) < value:
            value, best_direction = reached, direction
        # min t  subject to  cut·μ ≤ t for every cut, Σμ = 1, μ ≥ 0
        program = optimize.linprog(
            np.r_[np.zeros(m), 1.0],
            A_ub=np.c_[np.array(cuts), -np.ones(len(cuts))],
            b_ub=np.zeros(len(cuts)),
            A_eq=np.r_[np.ones(m), 0.0][None],
            b_eq=[1.0],
            bounds=[(0, None)] * m + [(None, None)],
        )
        solution = np.asarray(program.x)
        direction = solution[:m]
        if value - solution[m] <= 1e-9 * (1 + abs(value)):
            break
    return best_direction
