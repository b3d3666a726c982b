"""Families of policies with a known parametrization gap ν, their dual functions, and the bounds of
docs/theory.md.

On an enumerated world everything is a sum: D(λ) over all policies, D_p(λ) = max over the family, λ*
and λ_p* their minimizers. Inside this module λ and u are (m,) arrays in the order of
`problem.names`; policies are (num_prompts, num_responses) log-probabilities.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import pandas as pd
from scipy import optimize

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.dual.function import evaluate_dual
from constrained_dpo.dual.steps import auto_step_scale, dual_step, step_size_at
from constrained_dpo.problem import ConstrainedProblem, Constraint
from tests.helpers.tables import random_world

# the box on which ν of a log-linear family is known; every λ that a check uses is asserted to
# lie in it
MAX_LAMBDA = 6.0


def scaled_world(
    seed: int,
    num_constraints: int,
    std: float = 1.0,
    beta: float = 0.5,
    prompts: int = 12,
    responses: int = 200,
) -> TabularWorld:
    """conftest's random world with scores of this standard deviation and margins of 0.1 to 0.8 std,
    drawn by constraint."""
    world = random_world(seed, num_constraints, prompts, responses)
    margins = std * np.random.default_rng([seed, 1]).uniform(0.1, 0.8, num_constraints)
    problem = ConstrainedProblem(
        "r",
        beta,
        tuple(Constraint(n, margin=b) for n, b in zip(world.utilities, margins, strict=True)),
    )
    return TabularWorld(
        problem,
        world.ref_logp,
        std * world.reward,
        {n: std * g for n, g in world.utilities.items()},
    )


SMALL_WORLD = {"prompts": 4, "responses": 25}


def small_worlds(std: float, beta: float) -> list[tuple[int, TabularWorld]]:
    """Four small worlds with their seeds: two with one constraint, two with two."""
    return [
        (seed, scaled_world(seed, m, std, beta, **SMALL_WORLD)) for m in (1, 2) for seed in (3, 4)
    ]


def with_margin(world: TabularWorld, margin: float) -> TabularWorld:
    """The same world with another margin on its one constraint (score units)."""
    (name,) = world.problem.names
    return replace(
        world, problem=replace(world.problem, constraints=(Constraint(name, margin=margin),))
    )


def stacked_utilities(world: TabularWorld) -> np.ndarray:
    """(m, num_prompts, num_responses), score units."""
    return np.stack([world.utilities[n] for n in world.problem.names])


def score(world: TabularWorld, lam: np.ndarray) -> np.ndarray:
    """s_λ = r + λ·g, (num_prompts, num_responses)."""
    return world.reward + np.tensordot(lam, stacked_utilities(world), 1)


def objective_and_slack(world: TabularWorld, logp: np.ndarray) -> tuple[float, np.ndarray]:
    """F(π) = E[r] − β KL and u(π), score units."""
    exact = world.evaluate(logp)
    return exact.objective, np.array([exact.u[n] for n in world.problem.names])


def gibbs(world: TabularWorld, lam: np.ndarray) -> np.ndarray:
    """log π*_λ, the maximizer over all policies."""
    return world.maximizer(pd.Series(lam, index=world.problem.names))


def dual(world: TabularWorld, lam: np.ndarray) -> float:
    """D(λ) over all policies."""
    return evaluate_dual(world.score_table, lam, world.problem.beta, world.levels.to_numpy()).value


def oscillation(values: np.ndarray) -> float:
    """The largest range over the responses of a prompt: max_x (max_y − min_y)."""
    return float(np.ptp(values, axis=-1).max())


@dataclass(frozen=True)
class MixtureFamily:
    """Π_ε = {(1 − ε)π + ε π_ref : π any policy} = {p : p ≥ ε π_ref}, a convex set of policies; 0 ≤
    ε < 1."""

    world: TabularWorld
    epsilon: float

    @cached_property
    def nu(self) -> float:
        """The largest L1 distance of a policy to the family, exact: a point mass on a prompt's
        rarest response has it."""
        return 2 * self.epsilon * float(1 - np.exp(self.world.ref_logp.min()))

    def constant(self, lam: np.ndarray) -> float:
        """C_λ with D(λ) − D_p(λ) ≤ C_λ ν (A): (D(λ) − L(π_ref, λ)) ε/ν."""
        objective, slack = objective_and_slack(self.world, self.world.ref_logp)
        return (dual(self.world, lam) - objective - lam @ slack) / (
            2 * float(1 - np.exp(self.world.ref_logp.min()))
        )

    def maximizer(self, lam: np.ndarray) -> np.ndarray:
        """log of argmax_{p ∈ Π_ε} L(p, λ) = max(ε π_ref, π_ref exp(s_λ/β)/c), c by sorting: exact,
        no iteration.

        The responses at the floor are those of the lowest scores; with k of them, c is what makes
        the row sum to 1, and the right k is the first for which the lowest free response lies above
        the floor.
        """
        exponent = score(self.world, lam) / self.world.problem.beta
        order = np.argsort(exponent, axis=1)
        ascending, logref = (
            np.take_along_axis(a, order, 1) for a in (exponent, self.world.ref_logp)
        )
        floor_mass = np.cumsum(np.exp(logref), axis=1) - np.exp(logref)
        free = np.logaddexp.accumulate((logref + ascending)[:, ::-1], axis=1)[:, ::-1]
        log_c = free - np.log1p(-self.epsilon * floor_mass)
        with np.errstate(divide="ignore"):
            log_floor = np.log(self.epsilon)
        first = np.argmax(ascending - log_c > log_floor, axis=1)
        return self.world.ref_logp + np.maximum(
            log_floor, exponent - np.take_along_axis(log_c, first[:, None], 1)
        )


@dataclass(frozen=True)
class LogLinearFamily:
    """{π_ref exp(θ·φ)/Z : θ ∈ R^(1+m)} with φ = (r, g) + size·noise; not a convex set of policies.

    noise: (1 + m, num_prompts, num_responses), score units.
    """

    world: TabularWorld
    noise: np.ndarray
    size: float

    @classmethod
    def with_gap(cls, world: TabularWorld, nu: float, seed: int) -> "LogLinearFamily":
        """The family whose `nu` is this; 0 < nu < 2."""
        noise = (
            np.random.default_rng([seed, 2]).normal(
                size=(1 + len(world.problem.names), *world.reward.shape)
            )
            * world.reward.std()
        )
        unit = cls(world, noise, 1.0)
        return replace(unit, size=4 * np.arctanh(nu / 2) / unit.log_ratio_range(np.inf))

    @cached_property
    def features(self) -> np.ndarray:
        return (
            np.concatenate([self.world.reward[None], stacked_utilities(self.world)])
            + self.size * self.noise
        )

    def log_ratio_range(self, lam: np.ndarray | float) -> float:
        """B_λ: the range over responses of log(p_λ/π*_λ), p_λ the member θ = (1, λ)/β; np.inf: the
        largest over 0 ≤ λ ≤ MAX_LAMBDA.

        The range is convex in λ, so its largest value is at a corner of the box.
        """
        corners = (
            product((0.0, MAX_LAMBDA), repeat=len(self.noise) - 1) if np.ndim(lam) == 0 else [lam]
        )
        ranges = [oscillation(np.tensordot([1.0, *corner], self.noise, 1)) for corner in corners]
        return self.size * max(ranges) / self.world.problem.beta

    @cached_property
    def nu(self) -> float:
        """Every π*_λ with 0 ≤ λ ≤ MAX_LAMBDA is within this L1 distance of the family: 2 tanh(B/4)
        for log-ratios of range B."""
        return 2 * np.tanh(self.log_ratio_range(np.inf) / 4)

    def constant(self, lam: np.ndarray) -> float:
        """C_λ with D(λ) − D_p(λ) ≤ β KL(p_λ‖π*_λ) ≤ (β B_λ/2) ‖p_λ − π*_λ‖₁ ≤ C_λ ν (A)."""
        if np.max(lam) > MAX_LAMBDA:
            raise ValueError(f"λ {lam} lies outside the box on which ν is known")
        return self.world.problem.beta * self.log_ratio_range(lam) / 2

    def policy(self, theta: np.ndarray) -> np.ndarray:
        logp = self.world.ref_logp + np.tensordot(theta, self.features, 1)
        return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)

    def loss(self, theta: np.ndarray, lam: np.ndarray) -> float:
        """β E_x KL(π_θ‖π*_λ) = D(λ) − L(π_θ, λ), score units."""
        logp = self.policy(theta)
        return self.world.problem.beta * float(
            (np.exp(logp) * (logp - gibbs(self.world, lam))).sum(1).mean()
        )

    def ascend(self, theta: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """A stationary point of L(π_θ, λ): Newton where L is concave enough in θ, else natural
        gradient, with a line search on L.

        At one, E_x Cov_θ(φ, h) = 0 with h = s_λ − β θ·φ; −∇² L = β Cov_θ(φ) − E_θ[φ̂ φ̂ᵀ ĥ], hats:
        centred by prompt.
        """
        beta, target, value = self.world.problem.beta, score(self.world, lam), self.loss(theta, lam)
        for _ in range(500):
            weight = np.exp(self.policy(theta))
            centred = self.features - (weight * self.features).sum(-1, keepdims=True)
            rest = target - beta * np.tensordot(theta, self.features, 1)
            rest = rest - (weight * rest).sum(-1, keepdims=True)
            fisher, third = (
                np.einsum("ixy,jxy,xy->ij", centred, centred, w, optimize=True)
                for w in (weight, weight * rest)
            )
            gradient, curvature = (
                np.einsum("ixy,xy,xy->i", centred, rest, weight),
                beta * fisher - third,
            )
            newton = np.linalg.eigvalsh(curvature)[0] > 1e-2 * beta * np.linalg.eigvalsh(fisher)[0]
            step = np.linalg.lstsq(curvature if newton else beta * fisher, gradient, rcond=1e-13)[0]
            if np.abs(step).max() <= 1e-13 * (1 + np.abs(theta).max()):
                break
            size, trial = 1.0, self.loss(theta + step, lam)
            while trial > value + 1e-15 * (1 + value) and size > 1e-9:
                size /= 2
                trial = self.loss(theta + size * step, lam)
            theta, value = theta + size * step, trial
        return theta

    def best_theta(self, lam: np.ndarray) -> np.ndarray:
        """argmax_θ L(π_θ, λ), the better of the ascents from (1, λ)/β and from π_ref; more starts
        are tried in the tests."""
        aim = np.array([1.0, *lam]) / self.world.problem.beta
        return min(
            (self.ascend(start, lam) for start in (aim, np.zeros_like(aim))),
            key=lambda theta: self.loss(theta, lam),
        )

    def maximizer(self, lam: np.ndarray) -> np.ndarray:
        """log of the family's Lagrangian maximizer."""
        return self.policy(self.best_theta(lam))


Family = MixtureFamily | LogLinearFamily


@dataclass(frozen=True)
class Point:
    """The family's maximizer at λ: D_p(λ) = F + λ·u, its objective F and slack u (score units),
    logp."""

    lam: np.ndarray
    dual_value: float
    objective: float
    slack: np.ndarray
    logp: np.ndarray


def family_dual(family: Family, lam: np.ndarray) -> Point:
    logp = family.maximizer(lam)
    objective, slack = objective_and_slack(family.world, logp)
    return Point(lam, objective + float(lam @ slack), objective, slack, logp)


def minimize_family_dual(family: Family) -> Point:
    """argmin_{0 ≤ λ ≤ MAX_LAMBDA} D_p(λ): L-BFGS-B from λ*, then the root of the positive
    multipliers' slack."""

    def value(lam: np.ndarray) -> tuple[float, np.ndarray]:
        point = family_dual(family, lam)
        return point.dual_value, point.slack

    start = family.world.optimum.lambda_.to_numpy()
    options = {"ftol": 1e-15, "gtol": 1e-11}
    best = optimize.minimize(
        value,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, MAX_LAMBDA)] * len(start),
        options=options,
    )
    free = best.x > 1e-9
    lam = np.where(free, best.x, 0.0)
    if free.any():

        def free_slack(values: np.ndarray) -> np.ndarray:
            trial = np.zeros_like(lam)
            trial[free] = values
            return family_dual(family, trial).slack[free]

        root = optimize.root(free_slack, lam[free], tol=1e-13)
        if np.abs(root.fun).max() < np.abs(free_slack(lam[free])).max() and (root.x >= 0).all():
            lam[free] = root.x
    if lam.max() >= MAX_LAMBDA:
        raise ValueError(
            f"the family's multipliers {lam} lie at the edge of the box; no policy of it meets "
            "the margins"
        )
    return family_dual(family, lam)


def best_iterate(
    family: Family, start: np.ndarray, rounds: int, step_size: float, schedule: str
) -> tuple[Point, list[Point]]:
    """Dual descent as a run does it (`dual_steps`), with the family's exact maximizer: the iterate
    of the lowest D_p, and all of them."""
    problem = family.world.problem
    scale, lam, points = (
        auto_step_scale(family.world.score_table, problem),
        pd.Series(start, index=problem.names),
        [],
    )
    for t in range(rounds):
        points.append(family_dual(family, lam.to_numpy()))
        slack = pd.Series(points[-1].slack, index=problem.names)
        lam = dual_step(lam, slack, scale * step_size_at(step_size, schedule, t), MAX_LAMBDA)
    return min(points, key=lambda p: p.dual_value), points
